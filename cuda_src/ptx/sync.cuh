// ptx: ordered access to flags and counters in global memory (PTX ISA: "ld", "st", "red", "atom").
#pragma once

#include "core/types.cuh"

namespace ptx {

inline i32 ld_acquire_gpu(const i32* address) {
  i32 value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

inline void st_release_gpu(i32* address, i32 value) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// Returns what was at the address; `value` takes its place if that was `expected`.
inline i32 atom_acquire_gpu_cas(i32* address, i32 expected, i32 value) {
  i32 found;
  asm volatile("atom.acquire.gpu.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(found)
               : "l"(address), "r"(expected), "r"(value)
               : "memory");
  return found;
}

// Returns what was at the address, which becomes one more, or 0 where it was `last`.
inline i32 atom_acq_rel_gpu_inc(i32* address, i32 last) {
  i32 found;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(found) : "l"(address), "r"(last) : "memory");
  return found;
}

inline void red_release_gpu_add(i32* address, i32 value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// Orders this thread's plain accesses to global memory and those of the copy engine.
inline void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace ptx
