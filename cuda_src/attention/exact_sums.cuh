// attention: sums of float32 numbers by atomics, as they come, or exact ones, which are the same bits in any order.
#pragma once

#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/red.cuh"

namespace attention {

// The sums add up where they are wanted, from 0.
struct AtomicSums {
  float* sums;
  i64 count;

  void add(float* at, float x) const { ptx::red_add_f32(at, x); }

  void begin(i64 thread, i64 threads) const {
    for (i64 i = thread; i < count; i += threads) sums[i] = 0.0f;
  }

  void finish(i64, i64) const {}
};

// A sum is an integer, a multiple of 2^lowest, in `digits` digits of 32 bits, each of which adds up in a word of 64:
// additions of integers have no order. Digit k of sum i is word k · count + i, so that neighbours lie side by side. A
// word holds 2^31 additions (the host refuses more), and all digits together whatever is finite in float32, so that
// nothing overflows on the way. Bits below 2^lowest, which only numbers below 2^-105 have, are left out.
//
// Infinities and NaN add up where the sum is wanted, which is 0 without: infinity, or NaN, in whatever order they come.
struct ExactSums {
  static constexpr int digits = 8, digit_bits = 32, lowest = -128;

  float* sums;
  u64* words;
  i64 count;

  void add(float* at, float x) const {
    const u32 bits = __float_as_uint(x);
    const int exponent = bits >> 23 & 0xff;
    if (exponent == 0xff) {
      ptx::red_add_f32(at, x);
      return;
    }
    const u32 mantissa = (bits & 0x7fffff) | (exponent > 0 ? 0x800000 : 0);
    const int place = max_of(exponent, 1) - (127 + 23) - lowest;  // |x| = mantissa · 2^(place + lowest)
    const u64 shifted = place >= 0 ? u64(mantissa) << place % digit_bits : mantissa >> -place;
    const u64 low = shifted & 0xffffffff, high = shifted >> digit_bits;
    const bool negative = bits >> 31;
    u64* const to = words + max_of(place, 0) / digit_bits * count + (at - sums);
    if (low != 0) ptx::red_add_u64(to, negative ? -low : low);
    if (high != 0) ptx::red_add_u64(to + count, negative ? -high : high);
  }

  // Sets all sums to 0, as thread `thread` of `threads`.
  void begin(i64 thread, i64 threads) const {
    for (i64 i = thread; i < count; i += threads) sums[i] = 0.0f;
    for (i64 i = thread; i < digits * count; i += threads) words[i] = 0;
  }

  // Writes all sums, each rounded once, as thread `thread` of `threads`.
  void finish(i64 thread, i64 threads) const {
    for (i64 i = thread; i < count; i += threads) sums[i] += sum(i);
  }

 private:
  float sum(i64 i) const {
    u32 magnitude[digits];
    i64 carry = 0;
#pragma unroll
    for (int k = 0; k < digits; ++k) {
      carry += i64(words[k * count + i]);
      magnitude[k] = u32(carry);
      carry >>= digit_bits;
    }
    const bool negative = carry < 0;
    if (negative) {  // the two's complement
      u64 next = 1;
#pragma unroll
      for (int k = 0; k < digits; ++k) {
        next += u32(~magnitude[k]);
        magnitude[k] = u32(next);
        next >>= digit_bits;
      }
      carry = ~carry + i64(next);
    }
    // The first digit that is not 0, the next, and whether there are others: enough to round to nearest.
    u64 first = 0;
    bool behind = false;
    int place = 0;
#pragma unroll
    for (int k = 0; k < digits; ++k) {
      if (k > 1) behind |= magnitude[k - 2] != 0;
      if (magnitude[k] == 0) continue;
      first = u64(magnitude[k]) << digit_bits | (k > 0 ? magnitude[k - 1] : 0) | (behind ? 1 : 0);
      place = digit_bits * (k - 1) + lowest;
    }
    // A power of 2 that may be less than those of float32, in two factors.
    const float half = __uint_as_float(u32(127 + place / 2) << 23);
    const float rounded = carry != 0 ? infinity : float(first) * half * half;
    return negative ? -rounded : rounded;
  }
};

}  // namespace attention
