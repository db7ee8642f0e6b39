// ptx: ordered access to counters in global memory (PTX ISA: "ld", "red").
#pragma once

#include "core/types.cuh"

namespace ptx {

inline i32 ld_acquire_gpu(const i32* address) {
  i32 value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

inline void red_release_gpu_add(i32* address, i32 value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

}  // namespace ptx
