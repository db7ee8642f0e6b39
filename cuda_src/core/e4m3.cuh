// core: float8 e4m3 in integer arithmetic, for GPUs older than sm_89, which have no instruction for it.
#pragma once

#include "core/types.cuh"

// Bytes 0 and 2 of a register, which are e4m3, as a pair of float16 that are 2^-8 as large: the bits have the same
// order there, one place wider, and the exponent's bias is 8 less. What has all bits set is NaN: one more carries into
// the sign's place, from where it fills the exponent.
inline u32 f16_of_e4m3(u32 x) {
  const u32 size = x & 0x007f007f, nan = size + 0x00010001 & 0x00800080;
  return (size | nan) << 7 | (x & 0x00800080) << 8;
}

// A float32 value as e4m3, rounded to nearest even; numbers beyond the largest, 448, become that.
inline e4m3 e4m3_of(float x) {
  const u32 bits = __float_as_uint(x), sign = bits >> 24 & 0x80;
  if (x != x) return {0x7f};
  const float size = fminf(fabsf(x), 448.0f);
  // Numbers below 2^-6 are multiples of 2^-9, as those from 2^14 on are in float32.
  if (size < 0x1p-6f) return {u8(__float_as_uint(size + 0x1p14f) - __float_as_uint(0x1p14f) | sign)};
  const u32 wide = __float_as_uint(size), rounded = wide + 0x7ffff + (wide >> 20 & 1);
  return {u8((rounded >> 20) - ((127 - 7) << 3) | sign)};
}
