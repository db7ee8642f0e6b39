// attention: how warps share the products of the backward's kernel for sm_80, and how they add to sums of dq that lie
// in memory in the order of the rows of q.
#pragma once

#include "attention/backward_params.cuh"
#include "attention/backward_work.cuh"
#include "core/types.cuh"
#include "ptx/red.cuh"
#include "ptx/thread.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// How warps share the rows and columns of a product: `row_warps` × `column_warps` parts, rows fastest.
template <int rows, int cols, int row_warps, int column_warps>
struct Division {
  static constexpr int warps = row_warps * column_warps;
  static constexpr int m_tiles = rows / (16 * row_warps);
  static_assert(m_tiles * 16 * row_warps == rows, "warps share the rows evenly");
  using Part = tile::Accumulator<m_tiles, cols / column_warps>;
  static_assert(Part::cols * column_warps == cols, "warps share the columns evenly");

  static int row(u32 thread = ptx::tid_x()) { return thread / 32 % row_warps * (16 * m_tiles); }
  static int col(u32 thread = ptx::tid_x()) { return thread / 32 / row_warps % column_warps * Part::cols; }
};

// Adds columns of a thread's part of dq, from n-tile `first` on, to the thread's of the sums of a tile: of each number
// of a Part, those of all `threads` lie side by side.
template <class Part, int threads, int cols>
inline void add_columns(float* sums, int first, const tile::Accumulator<Part::m_tiles, cols>& dq) {
#pragma unroll
  for (int t = 0; t < Part::m_tiles; ++t) {
#pragma unroll
    for (int j = 0; j < cols / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::red_add_f32(sums + ((t * Part::n_tiles + first + j) * 4 + i) * threads, dq.x[t][j][i]);
      }
    }
  }
}

// Adds a warp's part of dq, which begins at first_row and first_col, to the sums of query head `head`.
template <class Config, class Part>
inline void add_rows(const BackwardParams& backward, const BackwardWork<Config>& work, int head, int first_row,
                     int first_col, const Part& dq) {
  const i64 head_row = i64(head) * backward.forward.seqlen_q + work.seqlen.q_first_row;
#pragma unroll
  for (int t = 0; t < Part::m_tiles; ++t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + tile::fragment_row(t, i);
      if (row >= work.seqlen.q) continue;
      float* const to = backward.dq_sum + (head_row + row) * Config::tile_head_dim + first_col + tile::fragment_col();
#pragma unroll
      for (int j = 0; j < Part::n_tiles; ++j) {
        ptx::red_add_f32(to + 8 * j, dq.x[t][j][2 * i]);
        ptx::red_add_f32(to + 8 * j + 1, dq.x[t][j][2 * i + 1]);
      }
    }
  }
}

}  // namespace attention
