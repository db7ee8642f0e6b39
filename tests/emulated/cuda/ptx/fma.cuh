// emulated: cuda_src/ptx/fma.cuh.
#pragma once

#include "ptx/convert.cuh"

namespace ptx {

// A product of two elements is exact in float64, and its sum with a third is rounded once more than by the instruction,
// which never decides whether it is finite.
template <class element>
inline void fma_x2(u32& sum, u32 a, u32 b) {
  const float2 x = cvt_f32_x2<element>(a), y = cvt_f32_x2<element>(b), z = cvt_f32_x2<element>(sum);
  sum = cvt_rn_x2<element>(float(double(x.x) * y.x + z.x), float(double(x.y) * y.y + z.y));
}

template <class element>
inline u32 mul_x2(u32 a, u32 b) {
  const float2 x = cvt_f32_x2<element>(a), y = cvt_f32_x2<element>(b);
  return cvt_rn_x2<element>(x.x * y.x, x.y * y.y);
}

}  // namespace ptx
