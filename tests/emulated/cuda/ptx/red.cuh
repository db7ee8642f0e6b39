// emulated: cuda_src/ptx/red.cuh.
#pragma once

#include "core/types.cuh"

namespace ptx {

inline void red_add_f32(float* address, float x) { emulated::reduce_add(address, x); }

inline void red_add_u64(u64* address, u64 x) { emulated::reduce_add(address, x); }

}  // namespace ptx
