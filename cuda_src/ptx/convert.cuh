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

// Nearest tf32 (8 bits of exponent, 10 of mantissa), ties away from zero: the only rounding sm_80 has.
inline u32 cvt_rna_tf32(float x) {
  u32 bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

}  // namespace ptx
