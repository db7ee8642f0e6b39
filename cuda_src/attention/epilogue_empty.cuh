// attention: writes rows that nothing is computed for: rows that see no key, and packed rows that are no sequence's.
#pragma once

#include "attention/block_range.cuh"
#include "attention/packed.cuh"
#include "attention/params.cuh"
#include "attention/work.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "tile/accumulator.cuh"
#include "tile/copy.cuh"

namespace attention {

// Writes the tile of a work whose rows see no key: zeros, and the sink as lse. Called by threads 0 to threads - 1.
template <class Config, int threads>
inline void epilogue_empty(const Params& params, const Work<Config>& work, float sink, int thread) {
  constexpr int chunks = ceil_div(Config::head_dim_v * sizeof(typename Config::element), 16);
  const int first_row = work.tile.m_block * Config::block_m;
  const int rows = min_of(Config::block_m, work.rows() - first_row);
  if constexpr (threads % chunks == 0 && Config::pack == 1 &&
                Config::store_bytes == 16) {  // a thread writes one column of chunks
    constexpr int step = threads / chunks;
    auto* to = reinterpret_cast<char*>(work.out_row(params, first_row + thread / chunks)) + thread % chunks * 16;
    const i64 step_bytes = step * params.out_strides.seqlen * int(sizeof(typename Config::element));
    constexpr int unroll = Config::varlen ? 1 : 4;  // the warp that finds packed tiles has few registers
#pragma unroll unroll
    for (int row = thread / chunks; row < rows; row += step) {
      *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
      to += step_bytes;
    }
  } else if constexpr (Config::store_bytes == 16) {
#pragma unroll 1
    for (int i = thread; i < rows * chunks; i += threads) {
      tile::store_chunk<16, Config::head_dim_v>(work.out_row(params, first_row + i / chunks), params.out_strides.dim,
                                                i % chunks, uint4{0, 0, 0, 0});
    }
  } else {  // elements are written singly, since registers may be few
    constexpr int cols = Config::head_dim_v;
#pragma unroll 1
    for (int i = thread; i < rows * cols; i += threads) {
      work.out_row(params, first_row + i / cols)[i % cols * params.out_strides.dim] = {};
    }
  }
  if (!work.lse) return;
#pragma unroll 1
  for (int row = thread; row < rows; row += threads) *work.lse_row(params, first_row + row) = sink;
}

// Writes the warp's share of all tiles of dense arrays whose rows see no key. Called by warp `warp` of `warps` of each
// thread block, which may have few registers; `work` is in shared memory and the warp's own.
template <class Config>
inline void write_empty_tiles(const Params& params, Work<Config>& work, int warp, int warps) {
  const Seqlen seqlen = dense_seqlen(params);
  const int heads = params.num_heads_q / Config::pack, tiles = params.m_blocks * heads * params.batch;
#pragma unroll 1
  for (int i = blockIdx.x * warps + warp; i < tiles; i += gridDim.x * warps) {
    const int m_block = i % params.m_blocks, head = i / params.m_blocks;
    const int key_head = Work<Config>::key_head(params, head % heads);
    if (!key_blocks<Config>(params, seqlen, head / heads, key_head, m_block).empty()) continue;
    __syncwarp();  // all lanes have read what the tile before is
    if (tile::lane() == 0) work.take(params, {m_block, head % heads, head / heads}, seqlen);
    __syncwarp();
    epilogue_empty<Config, 32>(params, work, work.sink(params), tile::lane());
  }
}

// Writes the thread block's share of the packed rows of q that are no sequence's: zeros in `out`, if that is new, and
// -infinity as lse. Called by warp `warp` of `warps` of each block, which may have few registers.
template <class Config, int unroll = 1>
inline void clear_outside(const Params& params, int warp, int warps) {
  using element = typename Config::element;
  constexpr int chunks = ceil_div(Config::head_dim_v * sizeof(element), 16);
  const auto offset = [&](int b) {
    return clamp(params.cu_seqlens_q[b * params.cu_seqlens_q_stride], 0, params.seqlen_q);
  };
  int end = offset(params.batch);
  if (end < params.seqlen_q) {  // else no offset before it can be larger
#pragma unroll unroll
    for (int b = tile::lane(); b < params.batch; b += 32) end = max_of(end, offset(b));
    end = __reduce_max_sync(0xffffffffu, end);
  }
  // The rows from the largest offset on, then the rows before the first offset.
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
