// attention: which entries of a tile a score term keeps that drops some. It is asked for masks of several entries at
// once: masks[2 (j % 2) + i] of 16 columns are of the pairs (j, 2 i) and (j, 2 i + 1) of an accumulator, the first in
// the low half, and have all bits where an entry is kept.
#pragma once

#include "attention/variant.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// The first entry of the pair that a mask is of, or the `second`, if it is kept, or 0.
inline float kept_or_0(float x, u32 mask, bool second) { return (second ? mask >> 16 : mask & 0xffff) != 0 ? x : 0.0f; }

// Probabilities that are dropped ← 0.
template <class Term, class Place, int m_tiles, int cols>
inline void drop(const Term& term, tile::Accumulator<m_tiles, cols>& probabilities, const Place& place) {
#pragma unroll
  for (int t = 0; t < m_tiles; ++t) {
    const auto row = place.row(t, 0);
#pragma unroll
    for (int s = 0; s < cols / 16; ++s) {
      u32 masks[4];
      row.keep(masks, term, 16 * s);
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        float& p = probabilities.x[t][2 * s + x / 4][x % 4];
        p = kept_or_0(p, masks[x / 2], x % 2);
      }
    }
  }
}

// The same where rows have terms of their own, and are of any queries.
template <class Place, int cols>
inline void drop_by_row(tile::Accumulator<1, cols>& probabilities, const Place& place) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const auto row = place.row(0, i);
#pragma unroll
    for (int s = 0; s < cols / 16; ++s) {
      u32 masks[2];
      row.variant.dropping().keep_row(masks, row.query, row.key + 16 * s);
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        float& p = probabilities.x[0][2 * s + x / 2][2 * i + x % 2];
        p = kept_or_0(p, masks[x / 2], x % 2);
      }
    }
  }
}

// Which entries of a tile are kept, a bit for each that a thread holds, where a term drops some: what `probabilities`
// and `gradients` both need, from one draw.
template <class Config, int m_tiles, int cols>
struct Kept {
  using Variant = typename Config::variant;
  static constexpr int squares = m_tiles * (cols / 16);  // of 16 rows by 16 columns, 8 bits each
  u32 bits[Variant::drops ? ceil_div(squares, 4) : 1];

  // `where` makes the tile's Place.
  template <class Where>
  void find(Where&& where) {
    if constexpr (Variant::drops) {
      const auto place = where();
      const Variant variant(place.params, place.batch, place.head);
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) {
        const auto row = place.row(t, 0);
#pragma unroll
        for (int s = 0; s < cols / 16; ++s) {
          const int square = t * (cols / 16) + s;
          u32 masks[4];
          row.keep(masks, variant.dropping(), 16 * s);
          if (square % 4 == 0) bits[square / 4] = 0;
#pragma unroll
          for (int x = 0; x < 4; ++x) bits[square / 4] |= masks[x] & 0x00010001u << (4 * (square % 4) + x);
        }
      }
    }
  }

  // 1 if entry (t, j, 2 i + e) is kept, or 0.
  float factor(int t, int i, int j, int e) const { return kept_or_0(1.0f, t, i, j, e); }

  // x, if the entry is kept, or 0, even if x is NaN.
  float kept_or_0(float x, int t, int i, int j, int e) const {
    if constexpr (!Variant::drops) return x;
    const int square = t * (cols / 16) + j / 2;
    return bits[square / 4] & 1u << (16 * e + 4 * (square % 4) + 2 * (j % 2) + i) ? x : 0.0f;
  }
};

}  // namespace attention
