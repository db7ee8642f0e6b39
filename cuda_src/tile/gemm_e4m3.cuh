// tile: a warp's matrix products with a B operand that lies in shared memory as e4m3, and is converted in registers to
// the 16-bit type of A. ldmatrix gives each lane two neighbouring 16-bit units, which here are four e4m3 side by side,
// where an operand wants two and two that are eight apart. Both products take columns in another order instead.
#pragma once

#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "tile/accumulator.cuh"
#include "tile/shared.cuh"

namespace tile {

// Puts the columns of a tile of A, 16 by 16, in the order in which a product with e4m3 takes them: of each four, the
// first two come to the first 8 columns and the others to the last. All `threads` threads call this between barriers.
template <int threads, class element, int rows, int cols>
inline void interleave(const SharedTile<element, rows, cols>& a, int thread) {
  static_assert(sizeof(element) == 2, "16 columns are two chunks");
  constexpr int pairs = cols / 16;
#pragma unroll 1
  for (int i = thread; i < rows * pairs; i += threads) {
    const u32 low = a.address(i / pairs, 2 * (i % pairs)), high = a.address(i / pairs, 2 * (i % pairs) + 1);
    const uint4 x = ptx::ld_shared_v4(low), y = ptx::ld_shared_v4(high);
    ptx::st_shared_v4(low, uint4{x.x, x.z, y.x, y.z});
    ptx::st_shared_v4(high, uint4{x.y, x.w, y.y, y.w});
  }
}

// The columns of V that an accumulator of P·V has where its own are counted as ever: of 16 columns the even ones come
// first. So a thread holds four side by side: x[t][j][2 * i + e] is column 16 (j / 2) + 4 (lane % 4) + 2 e + j % 2.
inline int quad_col() { return 4 * (lane() % 4); }

}  // namespace tile

namespace warp {

// scores = q·kᵀ for 16 rows of q from first_row on, which `interleave` has put in order, and all rows of k.
template <int depth, int block_n, class element, int block_m, int width>
inline void gemm_abt(tile::Accumulator<1, block_n>& scores, const tile::SharedTile<element, block_m, width>& q,
                     const tile::SharedTile<e4m3, block_n, width>& k, int first_row) {
  using Q = tile::SharedTile<element, block_m, width>;
  using K = tile::SharedTile<e4m3, block_n, width>;
  constexpr int steps = ceil_div(depth, 16);  // of 16 columns, a chunk of k
  const u32 lane = tile::lane();
  const u32 q_lane = q.address(first_row + lane % 16, lane / 16);
  const u32 k_lane = k.address(lane % 8 + (lane / 16) * 8, (lane / 8) % 2);
  scores.zero();
#pragma unroll
  for (int step = 0; step < steps; step += 2) {
    u32 a[2][4];
#pragma unroll
    for (int s = 0; s < 2; ++s) ptx::ldmatrix_x4(a[s], Q::step_chunks(q_lane, step + s));
#pragma unroll
    for (int j = 0; j < block_n / 8; j += 2) {
      u32 b[4];
      ptx::ldmatrix_x4(b, K::step_chunks(k_lane, step / 2) + K::step_rows(8 * j));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int s = 0; s < min_of(2, steps - step); ++s) {
          const uint2 wide = ptx::cvt_f16_x4(b[2 * h + s]);
          ptx::mma_m16n8k16<element>(scores.x[0][j + h], a[s], ptx::cvt_rn_of_f16_x2<element>(wide.x),
                                     ptx::cvt_rn_of_f16_x2<element>(wide.y));
        }
      }
    }
  }
}

// out += P·V in float16, V from column first_col on, where a panel begins. `out` has the columns of V in the order of
// tile::quad_col: ldmatrix.trans gives a lane two keys of two neighbouring columns, and a key after the other of each
// makes an operand.
template <int block_n, int out_cols, int width>
inline void gemm_ab(tile::Accumulator<1, out_cols>& out, const tile::Accumulator<1, block_n>& p,
                    const tile::SharedTile<e4m3, block_n, width>& v, int first_col) {
  using V = tile::SharedTile<e4m3, block_n, width>;
  const u32 lane = tile::lane();
  const u32 v_lane = v.address(lane % 16, lane / 16) + V::step_cols(first_col);
  tile::Operand<block_n> a;
  tile::pack<f16>(a, p);
#pragma unroll
  for (int step = 0; step < block_n / 16; ++step) {
#pragma unroll
    for (int j = 0; j < out_cols / 8; j += 4) {
      u32 b[4];
      ptx::ldmatrix_x4_trans(b, V::step_chunks(v_lane, j / 4) + V::step_rows(16 * step));
#pragma unroll
      for (int h = 0; h < min_of(2, (out_cols / 8 - j) / 2); ++h) {
        const uint2 upper = ptx::cvt_f16_x4(__byte_perm(b[2 * h], 0, 0x3120));
        const uint2 lower = ptx::cvt_f16_x4(__byte_perm(b[2 * h + 1], 0, 0x3120));
        ptx::mma_m16n8k16<f16>(out.x[0][j + 2 * h], a.x[step], upper.x, lower.x);
        ptx::mma_m16n8k16<f16>(out.x[0][j + 2 * h + 1], a.x[step], upper.y, lower.y);
      }
    }
  }
}

}  // namespace warp
