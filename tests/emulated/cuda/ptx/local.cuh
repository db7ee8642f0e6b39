// emulated: cuda_src/ptx/local.cuh. A thread's local memory is its stack.
#pragma once

#include "core/types.cuh"

namespace ptx {

inline u32 local_address(const void* pointer) { return emulated::local_address(pointer); }

template <int offset = 0>
inline float ld_local_f32(u32 address) {
  return *static_cast<const float*>(emulated::local_pointer(address + offset));
}

template <int offset = 0>
inline void st_local_f32(u32 address, float x) {
  *static_cast<float*>(emulated::local_pointer(address + offset)) = x;
}

}  // namespace ptx
