// attention: writes rows that nothing is computed for: those that see no key, and packed rows that are no sequence's.
#pragma once

#include "attention/packed.cuh"
#include "attention/params.cuh"
#include "attention/work.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "tile/accumulator.cuh"
#include "tile/copy.cuh"

namespace attention {

// Writes the tile of a work whose rows see no key: zeros, and the sink for lse. Called by threads 0 to threads - 1.
template <class Config, int threads>
inline void epilogue_empty(const Params& params, const Work<typename Config::element>& work, float sink, int thread) {
  constexpr int chunks = ceil_div(Config::head_dim_v * sizeof(typename Config::element), 16);
  constexpr int unroll = Config::store_bytes == 16 ? 2 : 1;  // else there are more stores in one
  const int first_row = work.tile.m_block * Config::block_m;
  const int rows = min_of(Config::block_m, work.template rows<Config>() - first_row);
#pragma unroll unroll
  for (int i = thread; i < rows * chunks; i += threads) {
    tile::store_chunk<Config::store_bytes, Config::head_dim_v>(
        work.template out_row<Config>(params, first_row + i / chunks), params.out_strides.dim, i % chunks,
        uint4{0, 0, 0, 0});
  }
  if (!work.lse) return;
#pragma unroll 1
  for (int row = thread; row < rows; row += threads) *work.template lse_row<Config>(params, first_row + row) = sink;
}

// The thread block's share of the packed rows of q that are no sequence's: zeros in `out`, if that is new, and
// -infinity for lse. Called by whole warps, `warp` of `warps` of each block, which may have few registers.
template <class Config, int unroll = 1>
inline void clear_outside(const Params& params, int warp, int warps) {
  using element = typename Config::element;
  constexpr int chunks = ceil_div(Config::head_dim_v * sizeof(element), 16);
  const auto offset = [&](int b) {
    return clamp(params.cu_seqlens_q[b * params.cu_seqlens_q_stride], 0, params.seqlen_q);
  };
  int end = offset(params.batch);
  if (end < params.seqlen_q) {  // else there is no need to look for a larger one before it
#pragma unroll unroll
    for (int b = tile::lane(); b < params.batch; b += 32) end = max_of(end, offset(b));
    end = __reduce_max_sync(0xffffffffu, end);
  }
  // Rows from the largest offset on, and then those before the first.
  const int count = params.seqlen_q - end + offset(0);
#pragma unroll 1
  for (int i = blockIdx.x * warps + warp; i < count; i += gridDim.x * warps) {
    const int row = end + i < params.seqlen_q ? end + i : end + i - params.seqlen_q;
#pragma unroll 1
    for (int head = 0; head < params.num_heads_q; ++head) {
      if (params.lse) params.lse[head * params.lse_head_stride + row] = -infinity;
      if (!params.clear_out) continue;
      element* const out =
          static_cast<element*>(params.out) + row * params.out_strides.seqlen + head * params.out_strides.head;
#pragma unroll 1
      for (int chunk = tile::lane(); chunk < chunks; chunk += 32) {
        tile::store_chunk<Config::store_bytes, Config::head_dim_v>(out, params.out_strides.dim, chunk,
                                                                   uint4{0, 0, 0, 0});
      }
    }
  }
}

}  // namespace attention
