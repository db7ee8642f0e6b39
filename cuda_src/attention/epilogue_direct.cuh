// attention: writes a finished tile straight from registers, so that it needs no shared memory and no barrier.
#pragma once

#include "attention/params.cuh"
#include "attention/repair.cuh"
#include "attention/softmax.cuh"
#include "attention/work.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "tile/accumulator.cuh"
#include "tile/copy.cuh"

namespace attention {

// Stores a row whose words on this thread are packed(j), n-tile by n-tile. Lanes of a quad trade columns, so that the
// quad stores 32 or 64 bytes side by side. 64 bytes take half the stores and twice the trades, which pays where rows
// are long.
template <class Config, int n_tiles, class Packed>
inline void store_traded(const Params& params, typename Config::element* row, bool live, const Packed& packed) {
  using element = typename Config::element;
  const i64 col_stride = params.out_strides.dim;
  if constexpr (n_tiles <= 16) {
    const tile::RowWriter<uint2, Config::store_bytes, Config::head_dim_v, element> to(row, col_stride,
                                                                                      warp::traded_chunk());
#pragma unroll
    for (int j = 0; j < n_tiles; j += 2) {
      const u32 first = packed(j), second = packed(j + 1);
      const uint2 traded = warp::trade(first, second);
      if (live) to.store(2 * j, warp::traded_chunk(), traded);
    }
  } else {
    const tile::RowWriter<uint4, Config::store_bytes, Config::head_dim_v, element> to(row, col_stride,
                                                                                      tile::lane() % 4);
#pragma unroll
    for (int j = 0; j < n_tiles; j += 4) {
      u32 x[4] = {};
#pragma unroll
      for (int t = 0; t < min_of(4, n_tiles - j); ++t) x[t] = packed(j + t);
      warp::quad_transpose(x);
      if (live) to.store(j, tile::lane() % 4, uint4{x[0], x[1], x[2], x[3]});
    }
  }
}

// Writes the warp's 16 rows of the work's tile, from row warp_row of the tile on. True if something is not finite.
template <class Config, int cols>
inline bool epilogue_direct(const tile::Accumulator<1, cols>& out, const Totals<1>& totals, const Params& params,
                            const Work<Config>& work, int warp_row) {
  using element = typename Config::element;
  NotFinite<element> not_finite;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = work.tile.m_block * Config::block_m + warp_row + tile::fragment_row(0, i);
    const bool live = row < work.rows();
    // The operators do not stop early: a branch would make other lanes wait for its read of shared memory.
    if (live & (work.lse != nullptr) & (tile::fragment_col() == 0)) {
      *work.lse_row(params, row) = totals.lse[0][i];
    }
    u32 before = 0;
    const auto packed = [&](int j) {
      const u32 words = ptx::cvt_rn_x2<element>(out.x[0][j][2 * i], out.x[0][j][2 * i + 1]);
      if (j % 2 == 1) not_finite.look(before, words);
      before = words;
      return words;
    };
    store_traded<Config, cols / 8>(params, work.out_row(params, row), live, packed);
  }
  return not_finite.found();
}

}  // namespace attention
