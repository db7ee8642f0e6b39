// emulated: conversions between float32 and the storage types, bit for bit as "cvt" makes them.
#pragma once

namespace emulated {

inline unsigned bits_of(float x) { return __builtin_bit_cast(unsigned, x); }
inline float float_of(unsigned bits) { return __builtin_bit_cast(float, bits); }

// Every NaN that an instruction makes is this one.
inline float canonical(float x) { return x != x ? float_of(0x7fffffffu) : x; }

inline float flush(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }

inline float from_bf16(unsigned short bits) { return float_of(unsigned(bits) << 16); }

inline float from_f16(unsigned short bits) {
  const unsigned sign = unsigned(bits & 0x8000u) << 16, rest = unsigned(bits & 0x7fffu) << 13;
  const float finite = float_of(rest) * 0x1p112f;  // subnormal numbers too
  const bool is_finite = (bits & 0x7c00u) != 0x7c00u;
  return float_of(sign | (is_finite ? bits_of(finite) : rest | 0x7f800000u));
}

inline unsigned short to_bf16(float x) {
  const unsigned bits = bits_of(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

inline unsigned short to_f16(float x) {
  const unsigned sign = bits_of(x) >> 16 & 0x8000u, size = bits_of(x) & 0x7fffffffu;
  if (x != x) return 0x7fff;
  if (size >= 0x477ff000u) return sign | 0x7c00u;  // halfway beyond the largest number, or more
  if (size < 0x38800000u) {                        // the result is subnormal: multiples of 2^-24, as those of 0.5
    return sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000u);
  }
  return sign | ((size + 0xfffu + (size >> 13 & 1u) - 0x38000000u) >> 13);
}

}  // namespace emulated
