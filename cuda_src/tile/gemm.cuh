// tile: a warp's matrix products from shared memory with mma.sync. A step is one mma.m16n8k16 for 16-bit elements;
// those of float32 are in gemm_tf32.cuh.
#pragma once

#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "tile/accumulator.cuh"
#include "tile/column_steps.cuh"
#include "tile/gemm_tf32.cuh"
#include "tile/shared.cuh"

namespace warp {

// Loads the first columns of 16 rows of a tile from `row` on, for gemm_abt to hold.
template <int cols, class Tile>
inline void load_operand(tile::Operand<cols>& operand, const Tile& from, int row) {
  const u32 lane = tile::lane();
  const u32 address = from.address(row + lane % 16, lane / 16);
#pragma unroll
  for (int step = 0; step < cols / 16; ++step) ptx::ldmatrix_x4(operand.x[step], Tile::step_chunks(address, step));
}

// sums += A·Bᵀ over `steps` steps for 16-bit elements, with A = 16 m_tiles rows of q and B = all rows of k, from
// addresses q_lane and k_lane on. A step reads 16 elements of each row; the first steps of A may be `held`. beside() is
// called with the number of each step when its products have been issued.
template <int steps, class Q, class K, int m_tiles, int block_n, int held_cols, class Beside>
inline void gemm_abt_steps(tile::Accumulator<m_tiles, block_n>& sums, const tile::Operand<held_cols>& held, u32 q_lane,
                           u32 k_lane, Beside&& beside) {
  static_assert(held_cols == 0 || m_tiles == 1, "the rows of one m-tile are held");
  using element = typename Q::element;
#pragma unroll
  for (int step = 0; step < steps; ++step) {
    u32 a[m_tiles][4];
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
      if (step < held_cols / 16) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[t][i] = held.x[step][i];
      } else {
        ptx::ldmatrix_x4(a[t], Q::step_chunks(q_lane, step) + Q::step_rows(16 * t));
      }
    }
#pragma unroll
    for (int j = 0; j < block_n / 8; j += 2) {
      u32 b[4];
      ptx::ldmatrix_x4(b, K::step_chunks(k_lane, step) + K::step_rows(8 * j));
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          ptx::mma_m16n8k16<element>(sums.x[t][j + h], a[t], b[2 * h], b[2 * h + 1]);
        }
      }
    }
    beside(step);
  }
}

// scores = a·bᵀ along `depth` columns, for 16 m_tiles rows of a from a_row on and `cols` rows of b from b_row on. The
// columns of a that `held` holds are not read. beside() is called once, beside the first products: copies that are
// issued there delay none. Before them, if the loop is rolled.
template <int depth, int m_tiles, int cols, class element, int a_rows, int b_rows, int width, int held_cols,
          class Beside>
inline void gemm_abt(tile::Accumulator<m_tiles, cols>& scores, const tile::Operand<held_cols>& held,
                     const tile::SharedTile<element, a_rows, width>& a,
                     const tile::SharedTile<element, b_rows, width>& b, int a_row, int b_row, Beside&& beside) {
  using A = tile::SharedTile<element, a_rows, width>;
  using B = tile::SharedTile<element, b_rows, width>;
  const u32 lane = tile::lane();
  const u32 a_lane = a.address(a_row + lane % 16, lane / 16);
  const u32 b_lane = b.address(b_row + lane % 8 + (lane / 16) * 8, (lane / 8) % 2);
  if constexpr (is_same<element, f32>) {
    static_assert(held_cols == 0, "float32 is split anew at every step");
    beside();
    gemm_abt_panels<tile::Splitting::plain, A, B>(scores, a_lane, b_lane);
    // Infinite and the largest numbers, or NaN: the sums are made again, since lse is made of them.
    if (unlikely(any_nan(scores))) gemm_abt_panels<tile::Splitting::bounded, A, B>(scores, a_lane, b_lane);
  } else {
    scores.zero();
    gemm_abt_steps<ceil_div(depth, 16), A, B>(scores, held, a_lane, b_lane, [&](int step) {
      if (step == 0) beside();
    });
  }
}

// The same for 16-bit elements; beside(step) is called beside the products of every step.
template <int depth, int m_tiles, int cols, class element, int a_rows, int b_rows, int width, class Beside>
inline void gemm_abt_beside(tile::Accumulator<m_tiles, cols>& scores, const tile::SharedTile<element, a_rows, width>& a,
                            const tile::SharedTile<element, b_rows, width>& b, int a_row, int b_row, Beside&& beside) {
  using A = tile::SharedTile<element, a_rows, width>;
  using B = tile::SharedTile<element, b_rows, width>;
  const u32 lane = tile::lane();
  scores.zero();
  gemm_abt_steps<ceil_div(depth, 16), A, B>(scores, tile::Operand<0>{}, a.address(a_row + lane % 16, lane / 16),
                                            b.address(b_row + lane % 8 + (lane / 16) * 8, (lane / 8) % 2), beside);
}

template <int depth, int m_tiles, int cols, class element, int a_rows, int b_rows, int width>
inline void gemm_abt(tile::Accumulator<m_tiles, cols>& scores, const tile::SharedTile<element, a_rows, width>& a,
                     const tile::SharedTile<element, b_rows, width>& b, int a_row, int b_row) {
  gemm_abt<depth>(scores, tile::Operand<0>{}, a, b, a_row, b_row, [] {});
}

// The same for all rows of k.
template <int depth, int m_tiles, int block_n, class element, int block_m, int width>
inline void gemm_abt(tile::Accumulator<m_tiles, block_n>& scores, const tile::SharedTile<element, block_m, width>& q,
                     const tile::SharedTile<element, block_n, width>& k, int first_row) {
  gemm_abt<depth>(scores, q, k, first_row, 0);
}

// out += P·V for 16-bit elements, V from column first_col on, where a panel begins. Two neighbouring n-tiles of an
// accumulator are, packed, the A operand of one step, so P never leaves its registers; V's columns come through
// ldmatrix.trans. prepare(step) makes the columns of p for a step, beside the products of the step before.
template <int m_tiles, int block_n, int out_cols, class element, int width, class Prepare>
inline void gemm_ab(tile::Accumulator<m_tiles, out_cols>& out, const tile::Accumulator<m_tiles, block_n>& p,
                    const tile::SharedTile<element, block_n, width>& v, int first_col, Prepare&& prepare) {
  using V = tile::SharedTile<element, block_n, width>;
  const u32 lane = tile::lane();
  const u32 v_lane = v.address(lane % 16, lane / 16) + V::step_cols(first_col);
  prepare(0);
#pragma unroll
  for (int step = 0; step < block_n / 16; ++step) {
    u32 a[m_tiles][4];
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const pair = &p.x[t][2 * step + i / 2][2 * (i % 2)];
        a[t][i] = ptx::cvt_rn_x2<element>(pair[0], pair[1]);
      }
    }
    if (step + 1 < block_n / 16) prepare(step + 1);
#pragma unroll
    for (int j = 0; j < out_cols / 8; j += 2) {
      u32 b[4];
      ptx::ldmatrix_x4_trans(b, V::step_chunks(v_lane, j / 2) + V::step_rows(16 * step));
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) {
        ptx::mma_m16n8k16<element>(out.x[t][j], a[t], b[0], b[1]);
        ptx::mma_m16n8k16<element>(out.x[t][j + 1], a[t], b[2], b[3]);
      }
    }
  }
}

template <int m_tiles, int block_n, int out_cols, class element, int width>
inline void gemm_ab(tile::Accumulator<m_tiles, out_cols>& out, const tile::Accumulator<m_tiles, block_n>& p,
                    const tile::SharedTile<element, block_n, width>& v, int first_col) {
  gemm_ab(out, p, v, first_col, [](int) {});
}

// out += A·B over all rows of b, for 16 m_tiles rows of A from first_row on and `cols` columns of b from first_col on,
// both multiples of 16. A is the tile a, or its transpose, whose fragments ldmatrix.trans reads.
template <Rows rows, int m_tiles, int cols, class A, class B>
inline void gemm_shared(tile::Accumulator<m_tiles, cols>& out, const A& a, const B& b, int first_row, int first_col) {
  using element = typename A::element;
  constexpr bool transposed = rows == Rows::along_columns;
  static_assert((transposed ? A::rows : A::cols) == B::rows, "the tiles must agree on the depth");
  const u32 lane = tile::lane();
  const u32 a_lane = transposed ? a.address(lane % 8 + (lane / 16) * 8, first_row / 8 + (lane / 8) % 2)
                                : a.address(first_row + lane % 16, lane / 16);
  const ColumnSteps<B, cols> b_lane(b.address(lane % 16, lane / 16), first_col);
#pragma unroll
  for (int step = 0; step < B::rows / 16; ++step) {
    u32 x[m_tiles][4];
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
      if constexpr (transposed) {
        ptx::ldmatrix_x4_trans(x[t], A::step_chunks(a_lane, t) + A::step_rows(16 * step));
      } else {
        ptx::ldmatrix_x4(x[t], A::step_chunks(a_lane, step) + A::step_rows(16 * t));
      }
    }
#pragma unroll
    for (int j = 0; j < cols / 8; j += 2) {
      u32 y[4];
      ptx::ldmatrix_x4_trans(y, b_lane.at(j / 2) + B::step_rows(16 * step));
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) {
        ptx::mma_m16n8k16<element>(out.x[t][j], x[t], y[0], y[1]);
        ptx::mma_m16n8k16<element>(out.x[t][j + 1], x[t], y[2], y[3]);
      }
    }
  }
}

// out += a·b and out += aᵀ·b, with the rows and columns of `gemm_shared`.
template <int m_tiles, int cols, class A, class B>
inline void gemm_ab(tile::Accumulator<m_tiles, cols>& out, const A& a, const B& b, int first_row, int first_col) {
  gemm_shared<Rows::along_rows>(out, a, b, first_row, first_col);
}

template <int m_tiles, int cols, class A, class B>
inline void gemm_atb(tile::Accumulator<m_tiles, cols>& out, const A& a, const B& b, int first_row, int first_col) {
  gemm_shared<Rows::along_columns>(out, a, b, first_row, first_col);
}

}  // namespace warp
