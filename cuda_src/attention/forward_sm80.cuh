// attention: the forward kernel for sm_80 and newer: one thread block a tile of queries.
#pragma once

#include "attention/block_range.cuh"
#include "attention/epilogue.cuh"
#include "attention/mainloop_sm80.cuh"
#include "attention/params.cuh"
#include "attention/scheduler.cuh"
#include "attention/seqlen.cuh"
#include "core/math.cuh"
#include "ptx/shared.cuh"
#include "tile/copy.cuh"

namespace attention {

// The rows of one head of one sequence.
template <class element>
inline tile::GlobalRows<element> head_rows(element* pointer, const Strides& strides, int batch, int head,
                                           int first_row) {
  return {pointer + batch * strides.batch + head * strides.head + first_row * strides.seqlen, strides.seqlen,
          strides.dim};
}

template <class Config>
inline void forward_sm80(const Params& params) {
  using element = typename Config::element;
  using Mainloop = MainloopSm80<Config>;
  using Out = typename Mainloop::Out;
  constexpr int staging_bytes = Config::block_m * Config::tile_head_dim_v * int(sizeof(element));
  static_assert(Config::smem_bytes == max_of(Mainloop::smem_bytes, staging_bytes),
                "cufa/_configs.py and the tiles disagree on shared memory");
  extern __shared__ __align__(1024) char dynamic_smem[];
  const u32 smem = ptx::shared_address(dynamic_smem);

  TileIndex tile;
  Seqlen seqlen;
  if constexpr (Config::varlen) {
    tile = varlen_tile<Config::block_m>(params, blockIdx.x);
    seqlen = varlen_seqlen(params, tile.batch);
  } else {
    tile = dense_tile(params, blockIdx.x);
    seqlen = dense_seqlen(params);
  }
  const int first_row = tile.m_block * Config::block_m;
  if (first_row >= seqlen.q) return;  // a slot of a packed batch that no tile needs

  const int head_k = tile.head / params.qheads_per_khead;
  const int batch = Config::varlen ? 0 : tile.batch;
  const auto rows = [&](const void* pointer, const Strides& strides, int head, int first) {
    return head_rows(static_cast<const element*>(pointer), strides, batch, head, first);
  };
  const BlockRange range = block_range<Config::block_m, Config::block_n, Config::causal, Config::window>(
      params, seqlen, tile.m_block);
  const typename Config::variant variant(params, tile.batch, tile.head);

  Out out;
  typename Mainloop::Statistics statistics;
  if (range.empty()) {
    out.zero();
    statistics.init();
  } else {
    Mainloop::run(out, statistics, params, seqlen, range, variant, tile.m_block,
                  rows(params.q, params.q_strides, tile.head, seqlen.q_first_row),
                  rows(params.k, params.k_strides, head_k, seqlen.k_first_row),
                  rows(params.v, params.v_strides, head_k, seqlen.k_first_row), smem);
    __syncthreads();  // every warp is done with the tiles the epilogue writes over
  }
  statistics.finish(out, Config::sinks ? params.sinks[tile.head * params.sinks_stride] : -infinity);
  epilogue<Config>(out, statistics,
                   head_rows(static_cast<element*>(params.out), params.out_strides, batch, tile.head,
                             seqlen.q_first_row),
                   params.lse ? params.lse + batch * params.lse_batch_stride +
                                    tile.head * params.lse_head_stride + seqlen.q_first_row
                              : nullptr,
                   first_row, Mainloop::warp_row(), seqlen.q, smem);
}

}  // namespace attention
