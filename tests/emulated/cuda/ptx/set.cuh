// emulated: cuda_src/ptx/set.cuh.
#pragma once

#include "ptx/convert.cuh"

namespace ptx {

inline u32 set_abs_lt_f16x2(u32 a, u32 b) {
  const float2 x = cvt_f32_x2<f16>(a), y = cvt_f32_x2<f16>(b);
  return (__builtin_fabsf(x.x) < y.x ? 0xffffu : 0) | (__builtin_fabsf(x.y) < y.y ? 0xffff0000u : 0);
}

}  // namespace ptx
