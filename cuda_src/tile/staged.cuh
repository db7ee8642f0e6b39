// tile: a warp's part of an accumulator on its way to a shared tile.
#pragma once

#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/shared.cuh"
#include "tile/accumulator.cuh"
#include "tile/column_steps.cuh"

namespace tile {

// Where `cols` columns of a warp go in a shared tile: pair by pair or, with by_squares, 16 by 16 elements of 16 bits.
template <class Tile, int cols, bool by_squares = ptx::has_stmatrix && sizeof(typename Tile::element) == 2>
struct Staged {
  using element = typename Tile::element;
  warp::ColumnSteps<Tile, cols> at;

  // The part begins at a row and a column of the tile that are multiples of 16.
  Staged(const Tile& tile, int row, int col) : at(first(tile, row, lane()), col) {}

  static u32 first(const Tile& tile, int row, u32 lane) {
    if constexpr (by_squares) return tile.address(row + lane % 16, lane / 16);
    if constexpr (is_same<element, f32>) return tile.address(row + lane / 4, lane % 4 / 2) + 8 * (lane % 2);
    return tile.address(row + lane / 4, 0) + 4 * (lane % 4);
  }

  // Stores elements 2 * i and 2 * i + 1 of the accumulator's part (t, j).
  void store(int t, int i, int j, float low, float high) const {
    static_assert(!by_squares, "a lane has the address of a row");
    if constexpr (is_same<element, f32>) {
      ptx::st_shared_v2(at.at(j) + Tile::step_rows(16 * t + 8 * i), __float_as_uint(low), __float_as_uint(high));
    } else {
      store_word(t, i, j, ptx::cvt_rn_x2<element>(low, high));
    }
  }

  // Stores the square of rows 16 t and columns 16 s on, whose pair of part (t, 2 s + j) with number i is word 2 j + i.
  void store_square(int t, int s, const u32 (&words)[4]) const {
    if constexpr (by_squares) {
      ptx::stmatrix_x4(at.at(s) + Tile::step_rows(16 * t), words);
    } else {
#pragma unroll
      for (int x = 0; x < 4; ++x) store_word(t, x % 2, 2 * s + x / 2, words[x]);
    }
  }

 private:
  void store_word(int t, int i, int j, u32 word) const {
    ptx::st_shared_u32((at.at(j / 2) ^ (j % 2 * 16)) + Tile::step_rows(16 * t + 8 * i), word);
  }
};

// words ← a square of an accumulator, rounded.
template <class element, int m_tiles, int cols>
inline void pack_square(u32 (&words)[4], const Accumulator<m_tiles, cols>& from, int t, int s) {
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    const float* const pair = &from.x[t][2 * s + x / 2][2 * (x % 2)];
    words[x] = ptx::cvt_rn_x2<element>(pair[0], pair[1]);
  }
}

}  // namespace tile
