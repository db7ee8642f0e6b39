// ptx: conversions between float32 and the storage types (PTX ISA: "cvt"). Rounding is to nearest even.
#pragma once

#include "core/e4m3.cuh"
#include "core/types.cuh"
#include "ptx/fma.cuh"

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

// The four e4m3 of a register as float16, which holds them exactly: bytes 0 and 1, and bytes 2 and 3.
inline uint2 cvt_f16_x4(u32 packed) {
#if __CUDA_ARCH__ >= 890
  uint2 wide;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high;}"
      : "=r"(wide.x), "=r"(wide.y)
      : "r"(packed));
  return wide;
#else
  constexpr u32 factors = 0x5c005c00, negative_zeros = 0x80008000;  // 2^8; a sum with -0 keeps the sign of either zero
  uint2 wide{negative_zeros, negative_zeros};
  fma_x2<f16>(wide.x, f16_of_e4m3(__byte_perm(packed, 0, 0x4140)), factors);
  fma_x2<f16>(wide.y, f16_of_e4m3(__byte_perm(packed, 0, 0x4342)), factors);
  return wide;
#endif
}

// A pair of float16 as a pair of elements.
template <class element>
inline u32 cvt_rn_of_f16_x2(u32 packed) {
  if constexpr (is_same<element, f16>) {
    return packed;
  } else {
    const float2 wide = cvt_f32_x2<f16>(packed);
    return cvt_rn_x2<element>(wide.x, wide.y);
  }
}

inline float cvt_f32(e4m3 x) { return cvt_f32(f16{u16(cvt_f16_x4(x.bits).x)}); }

// A float32 value as e4m3; numbers beyond the largest, 448, become that.
inline e4m3 cvt_rn_satfinite_e4m3(float x) {
#if __CUDA_ARCH__ >= 890
  u16 packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(0.0f), "f"(x));
  return {u8(packed)};
#else
  return e4m3_of(x);
#endif
}

}  // namespace ptx
