// tile: a warp's part of an accumulator on its way to a shared tile. The part begins at a row and a column of the tile
// that are multiples of 16.
#pragma once

#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/shared.cuh"
#include "tile/accumulator.cuh"
#include "tile/column_steps.cuh"

namespace tile {

// Where pairs of elements go. Each address is made of a row and a column, which cost nothing to find anew: one address
// for all would be a register more to keep, which is not there where terms fill them.
template <class Tile>
struct StagedPairs {
  using element = typename Tile::element;
  Tile tile;
  int row, col;

  StagedPairs(const Tile& tile, int row, int col) : tile(tile), row(row + lane() / 4), col(col + 2 * (lane() % 4)) {}

  // Stores elements 2 * i and 2 * i + 1 of the accumulator's part (t, j).
  void store(int t, int i, int j, float low, float high) const {
    const int byte = (col + 8 * j) * int(sizeof(element));
    const u32 address = tile.address(row, byte / 16) + byte % 16 + Tile::step_rows(16 * t + 8 * i);
    if constexpr (is_same<element, f32>)
      ptx::st_shared_v2(address, __float_as_uint(low), __float_as_uint(high));
    else
      ptx::st_shared_u32(address, ptx::cvt_rn_x2<element>(low, high));
  }
};

// Where squares of 16 by 16 elements of 16 bits go, of `cols` columns: by stmatrix, to which each lane gives the
// address of a row, or else word by word.
template <class Tile, int cols>
struct StagedSquares {
  static_assert(sizeof(typename Tile::element) == 2, "a word has two elements");
  warp::ColumnSteps<Tile, cols> at;

  StagedSquares(const Tile& tile, int row, int col) : at(first(tile, row, lane()), col) {}

  // Stores the square of rows 16 t and columns 16 s on, whose pair of part (t, 2 s + j) with number i is word 2 j + i.
  void store(int t, int s, const u32 (&words)[4]) const {
    if constexpr (ptx::has_stmatrix) {
      ptx::stmatrix_x4(at.at(s) + Tile::step_rows(16 * t), words);
    } else {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        ptx::st_shared_u32((at.at(s) ^ (x / 2 * 16)) + Tile::step_rows(16 * t + 8 * (x % 2)), words[x]);
      }
    }
  }

 private:
  static u32 first(const Tile& tile, int row, u32 lane) {
    if constexpr (ptx::has_stmatrix)
      return tile.address(row + lane % 16, lane / 16);
    else
      return tile.address(row + lane / 4, 0) + 4 * (lane % 4);
  }
};

// words ← a square of an accumulator, rounded, as StagedSquares stores it.
template <class element, int m_tiles, int cols>
inline void pack_square(u32 (&words)[4], const Accumulator<m_tiles, cols>& from, int t, int s) {
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    const float* const pair = &from.x[t][2 * s + x / 2][2 * (x % 2)];
    words[x] = ptx::cvt_rn_x2<element>(pair[0], pair[1]);
  }
}

}  // namespace tile
