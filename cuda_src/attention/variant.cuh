// attention: what happens to a score between q·k and the softmax. A variant is a list of terms, applied in the order of
// the specification. A term is a struct in a header of its own: a closure over Params, with `score`, its derivative
// `dscore` as a function of what `score` returned, and `per_head`: whether it differs from one query head to the next.
// The main loops know no term by name.
#pragma once

#include "attention/params.cuh"
#include "attention/seqlen.cuh"
#include "core/math.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// Where a score is. Terms take what they need; what no term asks for is never computed.
struct Point {
  int batch, head;  // which sequence, and which query head
  int query, key;   // of the sequence's own
  float distance;   // how far the key lies before the query's own position: query + diagonal - key
};

template <class... Terms>
struct Variant;

template <>
struct Variant<> {
  static constexpr bool empty = true, per_head = false;

  Variant(const Params&, int, int) {}

  float score(float s, const Point&) const { return s; }

  float score(float s, const Point&, float&) const { return s; }
};

template <class Term, class... Rest>
struct Variant<Term, Rest...> {
  static constexpr bool empty = false, per_head = Term::per_head || Variant<Rest...>::per_head;

  Term term;
  Variant<Rest...> rest;

  Variant(const Params& params, int batch, int head) : term(params, batch, head), rest(params, batch, head) {}

  float score(float s, const Point& at) const { return rest.score(term.score(s, at), at); }

  // The same; `derivative` is multiplied by the derivative of the result by s.
  float score(float s, const Point& at, float& derivative) const {
    const float scored = term.score(s, at);
    derivative *= term.dscore(scored, at);
    return rest.score(scored, at, derivative);
  }
};

// The factor that takes what apply() leaves in the tile to exponents of 2. Without terms the scale rides in the
// softmax's multiply-add and apply() does nothing.
template <class Variant>
inline float exponent_scale(const Params& params) {
  return Variant::empty ? params.exponent_scale : log2_e;
}

// first_row is where the warp's first row lies among the tile's rows, first_col the key of the tile's first column.
template <class Config, int m_tiles, int block_n, class Tile>
inline void apply(const typename Config::variant& variant, tile::Accumulator<m_tiles, block_n>& scores,
                  const Params& params, const Tile& tile, const Seqlen& seqlen, int first_row, int first_col) {
  if constexpr (!Config::variant::empty) {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + tile::fragment_row(t, i), query = row / Config::pack;
        const int head = tile.head * Config::pack + row % Config::pack;
        const int thread_key = first_col + tile::fragment_col();
        const float distance = float(query + seqlen.diagonal() - first_col - tile::fragment_col());
#pragma unroll
        for (int j = 0; j < block_n / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& s = scores.x[t][j][2 * i + e];
            const int col = 8 * j + e;
            const Point at{tile.batch, head, query, thread_key + col, distance - float(col)};
            s = variant.score(s * params.softmax_scale, at);
          }
        }
      }
    }
  }
}

}  // namespace attention
