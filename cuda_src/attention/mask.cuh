// attention: removes the entries of a score tile that a row may not see.
#pragma once

#include "attention/block_range.cuh"
#include "attention/masks.cuh"
#include "attention/params.cuh"
#include "attention/seqlen.cuh"
#include "core/math.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// first_row is the warp's first row, counted from row 0 of the head's first tile; first_col is the key of the tile's
// first column.
template <class Config, int m_tiles, int block_n>
inline void mask(tile::Accumulator<m_tiles, block_n>& scores, const Params& params, const Seqlen& seqlen, int first_row,
                 int first_col) {
  using Mask = typename Config::mask;
  const int thread_col = first_col + tile::fragment_col();
#pragma unroll
  for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = (first_row + tile::fragment_row(t, i)) / Config::pack;
      // Relative to this thread's columns, so that each comparison is with a constant.
      const int last = Mask::last_key(params, seqlen, row) - thread_col;
      const int first = Mask::first_key(params, seqlen, row) - thread_col;
#pragma unroll
      for (int j = 0; j < block_n / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int col = 8 * j + e;
          if (col > last || (Mask::hides_first && col < first)) scores.x[t][j][2 * i + e] = -infinity;
        }
      }
    }
  }
}

}  // namespace attention
