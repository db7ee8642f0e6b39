// attention: what happens to a score between q·k and the softmax. A variant is a list of terms, applied in the order of
// the specification; each is a closure over Params, with `score`, its derivative `dscore` as a function of what `score`
// returned, and `per_head`: whether the term differs from one query head to the next. The main loops know no term by
// name.
#pragma once

#include "attention/params.cuh"
#include "attention/seqlen.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/math.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// A score s becomes softcap · tanh(s / softcap).
template <class element>
struct Softcap {
  static constexpr bool per_head = false;

  float softcap, inverse, exponent;

  Softcap(const Params& params, int, int)
      : softcap(params.softcap), inverse(params.softcap_inverse), exponent(params.softcap_exponent) {}

  float score(float s, float) const {
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

  float dscore(float score) const {
    const float tanh = score * inverse;
    return fmaf(-tanh, tanh, 1.0f);
  }
};

// A score s becomes s - slope · |i + diagonal - j|: Press, Smith and Lewis, "Train Short, Test Long", 2022.
struct Alibi {
  static constexpr bool per_head = true;

  float slope;

  Alibi(const Params& params, int batch, int head)
      : slope(params.alibi_slopes[batch * params.alibi_batch_stride + head * params.alibi_head_stride]) {}

  float score(float s, float distance) const { return s - slope * fabsf(distance); }

  float dscore(float) const { return 1.0f; }
};

template <class... Terms>
struct Variant;

template <>
struct Variant<> {
  static constexpr bool empty = true, per_head = false;

  Variant(const Params&, int, int) {}

  float score(float s, float) const { return s; }

  float score(float s, float, float&) const { return s; }
};

template <class Term, class... Rest>
struct Variant<Term, Rest...> {
  static constexpr bool empty = false, per_head = Term::per_head || Variant<Rest...>::per_head;

  Term term;
  Variant<Rest...> rest;

  Variant(const Params& params, int batch, int head) : term(params, batch, head), rest(params, batch, head) {}

  float score(float s, float distance) const { return rest.score(term.score(s, distance), distance); }

  // The same; `derivative` is multiplied by the derivative of the result by s.
  float score(float s, float distance, float& derivative) const {
    const float scored = term.score(s, distance);
    derivative *= term.dscore(scored);
    return rest.score(scored, distance, derivative);
  }
};

// The factor that takes what apply() leaves in the tile to exponents of 2. Without terms the scale rides in the
// softmax's multiply-add and apply() does nothing.
template <class Variant>
inline float exponent_scale(const Params& params) {
  return Variant::empty ? params.exponent_scale : log2_e;
}

template <class Variant, int m_tiles, int block_n>
inline void apply(const Variant& variant, tile::Accumulator<m_tiles, block_n>& scores, const Params& params,
                  const Seqlen& seqlen, int first_row, int first_col) {
  if constexpr (!Variant::empty) {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + tile::fragment_row(t, i);
        const float distance = float(row + seqlen.diagonal() - first_col - tile::fragment_col());
#pragma unroll
        for (int j = 0; j < block_n / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& s = scores.x[t][j][2 * i + e];
            s = variant.score(s * params.softmax_scale, distance - float(8 * j + e));
          }
        }
      }
    }
  }
}

}  // namespace attention
