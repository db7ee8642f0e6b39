// ptx: accesses to local memory, a thread's own (PTX ISA: "ld", "st", "cvta"). What lies there stays there: the
// compiler does not hold it in registers.
#pragma once

#include "core/types.cuh"

namespace ptx {

inline u32 local_address(const void* pointer) {
  u64 address;
  asm volatile("cvta.to.local.u64 %0, %1;" : "=l"(address) : "l"(pointer));
  return u32(address);
}

template <int offset = 0>
inline float ld_local_f32(u32 address) {
  float x;
  asm volatile("ld.local.f32 %0, [%1 + %2];" : "=f"(x) : "r"(address), "n"(offset));
  return x;
}

template <int offset = 0>
inline void st_local_f32(u32 address, float x) {
  asm volatile("st.local.f32 [%0 + %1], %2;" ::"r"(address), "n"(offset), "f"(x) : "memory");
}

}  // namespace ptx
