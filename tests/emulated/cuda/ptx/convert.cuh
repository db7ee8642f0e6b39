// emulated: cuda_src/ptx/convert.cuh.
#pragma once

#include "core/e4m3.cuh"
#include "core/types.cuh"
#include "numbers.h"

namespace ptx {

template <class element>
inline u32 cvt_rn_x2(float low, float high) {
  static_assert(is_same<element, bf16> || is_same<element, f16>, "two elements fit a register only in 16 bits");
  if constexpr (is_same<element, bf16>)
    return emulated::to_bf16(low) | u32(emulated::to_bf16(high)) << 16;
  else
    return emulated::to_f16(low) | u32(emulated::to_f16(high)) << 16;
}

inline float cvt_f32(f32 x) { return x; }
inline float cvt_f32(bf16 x) { return emulated::from_bf16(x.bits); }
inline float cvt_f32(f16 x) { return emulated::from_f16(x.bits); }

template <class element>
inline element cvt_rn(float x) {
  if constexpr (is_same<element, f32>)
    return x;
  else
    return {u16(cvt_rn_x2<element>(x, 0.0f))};
}

template <class element>
inline float2 cvt_f32_x2(u32 packed) {
  return {cvt_f32(element{u16(packed)}), cvt_f32(element{u16(packed >> 16)})};
}

inline u32 scaled_by_256(u32 packed) {
  const float2 x = cvt_f32_x2<f16>(packed);
  return cvt_rn_x2<f16>(256.0f * x.x, 256.0f * x.y);
}

inline uint2 cvt_f16_x4(u32 packed) {
  return {scaled_by_256(f16_of_e4m3(__byte_perm(packed, 0, 0x4140))),
          scaled_by_256(f16_of_e4m3(__byte_perm(packed, 0, 0x4342)))};
}

template <class element>
inline u32 cvt_rn_of_f16_x2(u32 packed) {
  const float2 wide = cvt_f32_x2<f16>(packed);
  return cvt_rn_x2<element>(wide.x, wide.y);
}

inline float cvt_f32(e4m3 x) { return cvt_f32(f16{u16(cvt_f16_x4(x.bits).x)}); }

inline e4m3 cvt_rn_satfinite_e4m3(float x) { return e4m3_of(x); }

}  // namespace ptx
