// attention: which entries of a tile a score term keeps that drops some. It is asked for masks of several entries at
// once: masks[2 (j % 2) + i] of 16 columns are of the pairs (j, 2 i) and (j, 2 i + 1) of an accumulator, the first in
// the low half, and have all bits where an entry is kept.
#pragma once

#include "attention/variant.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/fma.cuh"
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

// Which entries of a tile are kept, a bit for each that a thread holds, where a term drops some: what probabilities and
// their gradients both need, from one draw, which needs no scores.
template <class Config, int m_tiles, int cols>
struct Kept {
  using Variant = typename Config::variant;
  static constexpr int squares = m_tiles * (cols / 16);  // of 16 rows by 16 columns, 8 bits each
  u32 bits[Variant::drops ? ceil_div(squares, 4) : 1];

  // What `weighed` multiplies by where an entry is kept: 2 is a single bit in float16 and in bfloat16, so a bit of what
  // is kept need only be moved there.
  static constexpr float unit = Variant::drops ? 2.0f : 1.0f;
  static constexpr int unit_bit = 14;

  // Of pair x of a square, 2 (j % 2) + i, the first entry has this bit of the square's word, the second that 16
  // further.
  static constexpr int bit(int square, int x) { return 4 * (square % 4) + x; }

  // `where` makes the tile's Place.
  template <class Where>
  void find(Where&& where) {
    if constexpr (Variant::drops) {
      const auto place = where();
      const Variant variant(place.params, place.batch, place.head);
      const auto& term = variant.dropping();
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) {
        const auto row = place.row(t, 0);
#pragma unroll
        for (int s = 0; s < cols / 16; ++s) {
          const int square = t * (cols / 16) + s;
          u32 below[4];
          row.draw(below, term, s);
          if (square % 4 == 0) bits[square / 4] = 0;
#pragma unroll
          for (int x = 0; x < 4; ++x) bits[square / 4] |= below[x] & 0x00010001u << bit(square, x);
        }
      }
      const auto row = place.row(0, 0);
#pragma unroll
      for (u32& word : bits) word = row.own(term.kept(word));
    }
  }

  // 1 if entry (t, j, 2 i + e) is kept, or 0.
  float factor(int t, int i, int j, int e) const { return kept_or_0(1.0f, t, i, j, e); }

  // x, if the entry is kept, or 0, even if x is NaN.
  float kept_or_0(float x, int t, int i, int j, int e) const {
    if constexpr (!Variant::drops) return x;
    const int square = t * (cols / 16) + j / 2;
    return bits[square / 4] & 1u << (16 * e + bit(square, 2 * (j % 2) + i)) ? x : 0.0f;
  }

  // Packed entries (0, j, 2 i) and (0, j, 2 i + 1), times `unit` where they are kept, and else times 0, as NaN is to
  // stay.
  template <class element>
  u32 weighed(u32 packed, int i, int j) const {
    if constexpr (!Variant::drops) return packed;
    const int from = bit(j / 2, 2 * (j % 2) + i);
    const u32 word = bits[j / 8];
    const u32 moved = from > unit_bit ? word >> (from - unit_bit) : word << (unit_bit - from);
    return ptx::mul_x2<element>(packed, moved & 0x00010001u << unit_bit);
  }
};

// Stands for what is kept where nothing is dropped yet.
struct AllKept {
  float factor(int, int, int, int) const { return 1.0f; }
};

}  // namespace attention
