// ptx: reductions in global memory (PTX ISA: "red").
#pragma once

#include "core/types.cuh"

namespace ptx {

inline void red_add_f32(float* address, float x) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address), "f"(x) : "memory");
}

inline void red_add_u64(u64* address, u64 x) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(address), "l"(x) : "memory");
}

}  // namespace ptx
