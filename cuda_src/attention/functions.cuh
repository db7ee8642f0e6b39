// attention: what score and mask functions of callers call, in the words of cufa/functions.py.
#pragma once

#include "core/dual.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/math.cuh"
#include "ptx/red.cuh"

namespace attention {

// For kernels of 16-bit elements approximations that are good to about 2^-22, and float32's own functions for others.
template <class element>
struct Functions {
  static constexpr bool exact = is_same<element, f32>;

  static float exp2(float x) { return exact ? exp2f(x) : ptx::ex2_approx_ftz(x); }
  static float exp(float x) { return exact ? expf(x) : ptx::ex2_approx_ftz(x * log2_e); }
  static float log2(float x) { return exact ? log2f(x) : ptx::lg2_approx(x); }
  static float log(float x) { return exact ? logf(x) : ptx::lg2_approx(x) * ln_2; }
  static float divide(float a, float b) { return exact ? a / b : a * ptx::rcp_approx_ftz(b); }
  static float sigmoid(float x) { return divide(1.0f, 1.0f + exp(-x)); }
  static float pow(float a, float b) { return powf(a, b); }

  // This is good to 2^-22 absolutely. Where x is small and what it is multiplied by large that is not enough; there two
  // terms of the series are good to 2^-27 relatively.
  static float tanh(float x) {
    if constexpr (exact) return tanhf(x);
    const float large = fmaf(-2.0f, ptx::rcp_approx_ftz(ptx::ex2_approx_ftz(x * (2.0f * log2_e)) + 1.0f), 1.0f);
    const float square = x * x;
    const float small = fmaf(x * square, fmaf(square, 2.0f / 15.0f, -1.0f / 3.0f), x);
    return fabsf(x) < 0.0625f ? small : large;
  }

  static int abs(int x) { return x < 0 ? -x : x; }

  // Rounded down, as in Python; 0 if b is 0.
  static int floordiv(int a, int b) {
    if (b == 0) return 0;
    const int quotient = a / b;
    return quotient - (quotient * b != a && (a < 0) != (b < 0));
  }
  static float floordiv(float a, float b) { return floorf(a / b); }

  // Of the sign of b, as in Python.
  static int mod(int a, int b) { return b == 0 ? 0 : a - floordiv(a, b) * b; }
  static float mod(float a, float b) { return fmaf(-floordiv(a, b), b, a); }

  // The place of an index along an axis: that of the nearest one that there is.
  static i64 place(int index, int extent) { return clamp(index, 0, extent - 1); }
};

// The same by the names that C++ has for them, of floats and of dual numbers.
template <class element>
struct DualFunctions {
  using F = Functions<element>;

  static float exp(float x) { return F::exp(x); }
  static float exp2(float x) { return F::exp2(x); }
  static float log(float x) { return F::log(x); }
  static float log2(float x) { return F::log2(x); }
  static float tanh(float x) { return F::tanh(x); }
  static float sigmoid(float x) { return F::sigmoid(x); }
  static float sqrt(float x) { return sqrtf(x); }
  static float abs(float x) { return fabsf(x); }
  static int abs(int x) { return F::abs(x); }
  static float floor(float x) { return floorf(x); }
  static float ceil(float x) { return ceilf(x); }
  static float minimum(float a, float b) { return fminf(a, b); }
  static float maximum(float a, float b) { return fmaxf(a, b); }
  static float where(bool condition, float a, float b) { return condition ? a : b; }

  static Dual exp(Dual x) {
    const float y = F::exp(x.value);
    return x.through(y, y);
  }
  static Dual exp2(Dual x) {
    const float y = F::exp2(x.value);
    return x.through(y, ln_2 * y);
  }
  static Dual log(Dual x) { return x.through(F::log(x.value), 1.0f / x.value); }
  static Dual log2(Dual x) { return x.through(F::log2(x.value), log2_e / x.value); }
  static Dual tanh(Dual x) {
    const float y = F::tanh(x.value);
    return x.through(y, fmaf(-y, y, 1.0f));
  }
  static Dual sigmoid(Dual x) {
    const float y = F::sigmoid(x.value);
    return x.through(y, fmaf(-y, y, y));
  }
  static Dual sqrt(Dual x) {
    const float y = sqrtf(x.value);
    return x.through(y, 0.5f / y);
  }
  static Dual abs(Dual x) { return x.value < 0.0f ? -x : x; }
  static Dual floor(Dual x) { return floorf(x.value); }
  static Dual ceil(Dual x) { return ceilf(x.value); }
  static Dual minimum(Dual a, Dual b) { return a <= b ? a : b; }
  static Dual maximum(Dual a, Dual b) { return a >= b ? a : b; }
  static Dual where(bool condition, Dual a, Dual b) { return condition ? a : b; }
};

// *to += the sum of x of all lanes of a warp.
inline void add_of_warp(float* to, float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  if (threadIdx.x % 32 == 0 && x != 0.0f) ptx::red_add_f32(to, x);
}

}  // namespace attention
