// attention: what happens to a score between q·k and the softmax. A variant is a list of terms, applied in the order of
// the specification. The main loops know no term by name.
#pragma once

#include "attention/params.cuh"
#include "attention/seqlen.cuh"
#include "attention/term.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "tile/accumulator.cuh"

namespace attention {

template <class... Terms>
struct Variant;

template <>
struct Variant<> {
  static constexpr bool empty = true, per_head = false;
  static constexpr int words = 0;

  Variant(const Params&, int, int) {}
  Variant(const u64*, int, int) {}

  float score(float s, const Point&) const { return s; }

  float score(float s, const Point&, float&) const { return s; }
};

template <class Term, class... Rest>
struct Variant<Term, Rest...> {
  using Data = typename Term::Data;
  static constexpr bool empty = false, per_head = Term::per_head || Variant<Rest...>::per_head;

  // The data of a term begin with a word of Params::terms, behind those of the terms before it.
  static constexpr int own_words = ceil_div(int(sizeof(Data)), int(sizeof(u64)));
  static constexpr int words = own_words + Variant<Rest...>::words;
  static_assert(words <= Params::max_term_words, "the data of all terms must fit Params::terms");

  Term term;
  Variant<Rest...> rest;

  Variant(const Params& params, int batch, int head) : Variant(params.terms, batch, head) {}
  Variant(const u64* data, int batch, int head)
      : term(*reinterpret_cast<const Data*>(data), batch, head), rest(data + own_words, batch, head) {}

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
            const bool live = query < seqlen.q && thread_key + col < seqlen.k;
            const Point at{tile.batch, head, query, thread_key + col, distance - float(col), live};
            s = variant.score(s * params.softmax_scale, at);
          }
        }
      }
    }
  }
}

}  // namespace attention
