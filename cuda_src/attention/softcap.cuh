// attention: the score term that keeps scores within a softcap.
#pragma once

#include "attention/term.cuh"
#include "core/types.cuh"
#include "ptx/math.cuh"

namespace attention {

struct SoftcapData {
  float softcap, inverse, exponent;  // softcap, 1 / softcap and 2 log2 e / softcap
};

// A score s becomes softcap · tanh(s / softcap).
template <class element>
struct Softcap : Term {
  using Data = SoftcapData;
  static constexpr bool per_head = false;

  float softcap, inverse, exponent;

  Softcap(const Data& data, int, int) : softcap(data.softcap), inverse(data.inverse), exponent(data.exponent) {}

  float score(float s, const Point&) const {
    const float x = s * inverse;
    if constexpr (is_same<element, f32>) return softcap * tanhf(x);
    // tanh.approx (2^-11) would show in a 16-bit P. This is good to 2^-22 absolutely, which is not enough where the
    // softcap is so large that x is small; there two terms of the series are good to 2^-27 relatively.
    const float e = ptx::ex2_approx_ftz(s * exponent);
    const float large = softcap * fmaf(-2.0f, ptx::rcp_approx_ftz(e + 1.0f), 1.0f);
    const float square = x * x;
    const float small = fmaf(s * square, fmaf(square, 2.0f / 15.0f, -1.0f / 3.0f), s);
    return fabsf(x) < 0.0625f ? small : large;
  }

  float dscore(float scored, const Point&) const {
    const float tanh = scored * inverse;
    return fmaf(-tanh, tanh, 1.0f);
  }
};

}  // namespace attention
