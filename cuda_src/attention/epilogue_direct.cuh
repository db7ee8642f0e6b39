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

// Writes the warp's 16 rows of the work's tile, from row warp_row of it on. True if something is not finite.
template <class Config, int cols>
inline bool epilogue_direct(const tile::Accumulator<1, cols>& out,
                            const Softmax<typename Config::element, 1>& statistics, const Params& params,
                            const Work<typename Config::element>& work, int warp_row) {
  using element = typename Config::element;
  NotFinite<element> not_finite;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = work.tile.m_block * Config::block_m + warp_row + tile::fragment_row(0, i);
    const bool live = row < work.template rows<Config>();
    if (live && work.lse && tile::fragment_col() == 0) {
      *work.template lse_row<Config>(params, row) = statistics.base[0][i];
    }
    const tile::RowWriter<Config::store_bytes, Config::head_dim_v, element> to(
        work.template out_row<Config>(params, row), params.out_strides.dim, warp::traded_chunk());
#pragma unroll
    for (int j = 0; j < cols / 8; j += 2) {
      const auto packed = [&](int j) { return ptx::cvt_rn_x2<element>(out.x[0][j][2 * i], out.x[0][j][2 * i + 1]); };
      const u32 first = packed(j), second = packed(j + 1);
      not_finite.look(first, second);
      const uint2 traded = warp::trade(first, second);
      if (live) to.store(2 * j, traded);
    }
  }
  return not_finite.found();
}

}  // namespace attention
