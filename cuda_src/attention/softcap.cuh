// attention: the score term that keeps scores within a softcap.
#pragma once

#include "attention/functions.cuh"
#include "attention/term.cuh"
#include "core/types.cuh"
#include "ptx/math.cuh"

namespace attention {

struct SoftcapData {
  float softcap, inverse, exponent;  // softcap, 1 / softcap and 2 log2 e / softcap
};

// A score s becomes softcap · tanh(s / softcap). Where the softcap is `low`, what errs by 2^-22 of it is good enough
// for kernels of 16-bit elements; tanh.approx (2^-11) would show in a P of 16 bits.
template <class element, bool low = true>
struct Softcap : Term {
  using Data = SoftcapData;
  static constexpr bool per_head = false, pairs = low && !is_same<element, f32>;

  float softcap, inverse, exponent;

  Softcap(const Data& data, int, int) : softcap(data.softcap), inverse(data.inverse), exponent(data.exponent) {}

  float score(float s, const Point&) const {
    if constexpr (!pairs) return softcap * Functions<element>::tanh(s * inverse);
    return of_inverse(ptx::rcp_approx_ftz(ptx::ex2_approx_ftz(s * exponent) + 1.0f));
  }

  // Both share a reciprocal, since the special-function unit is what they wait for: 1 / a is b / (a b). The product
  // stays finite, and at 2^60 the quotient has long been 0 beside 1.
  void score(float (&s)[2], float scale) const {
    constexpr float end = 60.0f;
    const float factor = scale * exponent;
    const float a = ptx::ex2_approx_ftz(ptx::min_nan(s[0] * factor, end)) + 1.0f;
    const float b = ptx::ex2_approx_ftz(ptx::min_nan(s[1] * factor, end)) + 1.0f;
    const float both = ptx::rcp_approx_ftz(a * b);
    s[0] = of_inverse(both * b);
    s[1] = of_inverse(both * a);
  }

  float dscore(float scored, const Point&) const {
    const float tanh = scored * inverse;
    return fmaf(-tanh, tanh, 1.0f);
  }

 private:
  // The result for 1 / (e^(2 s / softcap) + 1).
  float of_inverse(float x) const { return fmaf(-2.0f * softcap, x, softcap); }
};

}  // namespace attention
