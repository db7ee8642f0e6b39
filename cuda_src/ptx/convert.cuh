// ptx: conversions between float32 and the storage types (PTX ISA: "cvt"). Rounding is to nearest even.
#pragma once

#include "core/types.cuh"

namespace ptx {

// Two float32 values as two 16-bit elements of one register, `low` in the low half (the instruction takes it last).
template <class element>
inline u32 cvt_rn_x2(float low, float high) {
  u32 packed;
  if constexpr (is_same<element, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    static_assert(is_same<element, f16>, "two elements fit a register only in 16 bits");
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// An element as float32.
inline float cvt_f32(f32 x) { return x; }

inline float cvt_f32(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

inline float cvt_f32(f16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

// A float32 value as an element.
template <class element>
inline element cvt_rn(float x) {
  if constexpr (is_same<element, f32>)
    return x;
  else
    return {u16(cvt_rn_x2<element>(x, 0.0f))};
}

// The two elements of a register.
template <class element>
inline float2 cvt_f32_x2(u32 packed) {
  if constexpr (is_same<element, bf16>) {
    return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000)};
  } else {
    return {cvt_f32(f16{u16(packed)}), cvt_f32(f16{u16(packed >> 16)})};
  }
}

}  // namespace ptx
