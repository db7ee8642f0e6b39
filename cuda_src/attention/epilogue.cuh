// attention: writes a finished tile: out through shared memory, so that rows leave in whole chunks, and lse.
#pragma once

#include "attention/params.cuh"
#include "attention/repair.cuh"
#include "attention/softmax.cuh"
#include "attention/work.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/shared.cuh"
#include "tile/accumulator.cuh"
#include "tile/copy.cuh"
#include "tile/shared.cuh"

namespace attention {

// Writes the warp's part of a tile to shared memory. True if something in it is not finite.
template <class Tile, int m_tiles, int cols>
inline bool stage(const Tile& staging, const tile::Accumulator<m_tiles, cols>& out, int warp_row, int warp_col) {
  using element = typename Tile::element;
  static_assert(cols % 16 == 0, "fragments are looked at in pairs");
  NotFinite<element> not_finite;
#pragma unroll
  for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warp_row + tile::fragment_row(t, i);
      u32 before = 0;
#pragma unroll
      for (int j = 0; j < cols / 8; ++j) {
        const float low = out.x[t][j][2 * i], high = out.x[t][j][2 * i + 1];
        const int byte = (warp_col + 8 * j + tile::fragment_col()) * int(sizeof(element));
        const u32 address = staging.address(row, byte / 16) + byte % 16;
        if constexpr (is_same<element, f32>) {
          ptx::st_shared_v2(address, __float_as_uint(low), __float_as_uint(high));
          not_finite.look(low, high);
        } else {
          const u32 packed = ptx::cvt_rn_x2<element>(low, high);
          ptx::st_shared_u32(address, packed);
          if (j % 2 == 1) not_finite.look(before, packed);
          before = packed;
        }
      }
    }
  }
  return not_finite.found();
}

// Writes the rows of the work's tile; the staging tile is free when this is called.
template <class Config, int m_tiles, int cols, class Tile>
inline void epilogue(const tile::Accumulator<m_tiles, cols>& out, const Totals<m_tiles>& totals, const Params& params,
                     const Work<Config>& work, int warp_row, int warp_col, const Tile& staging) {
  const int first_row = work.tile.m_block * Config::block_m;
  const bool not_finite = stage(staging, out, warp_row, warp_col);
  if (work.lse && warp_col + tile::fragment_col() == 0) {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + warp_row + tile::fragment_row(t, i);
        if (row < work.seqlen.q) work.lse[row] = totals.lse[t][i];
      }
    }
  }
  const bool to_repair = __syncthreads_or(not_finite);
  const tile::GlobalRows<typename Config::element> rows{work.out, params.out_strides.seqlen, params.out_strides.dim};
  const block::Chunks<Config::num_threads, Config::copy_unroll, Config::store_bytes, Tile, typename Config::element>
      chunks(staging, rows, first_row, work.seqlen.q);
  block::store<Config::head_dim_v>(chunks);
  if (unlikely(to_repair)) {
    __syncthreads();  // all is written
    constexpr int rows = Config::block_m / (Config::num_threads / 32);
    repair<Config>(params, work, first_row + int(threadIdx.x / 32) * rows, rows);
  }
}

}  // namespace attention
