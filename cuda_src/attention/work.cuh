// attention: what a thread block works on. It lives in shared memory and is read where it is needed: the accumulators
// leave the main loop no registers to carry it in.
#pragma once

#include "attention/block_range.cuh"
#include "attention/params.cuh"
#include "attention/scheduler.cuh"
#include "attention/seqlen.cuh"
#include "tile/copy.cuh"

namespace attention {

template <class element>
struct Work {
  TileIndex tile;
  Seqlen seqlen;
  BlockRange range;
  const element* q;  // the first row and column of this head of this sequence; k, v, out and lse alike
  const element* k;
  const element* v;
  element* out;
  float* lse;  // null: not wanted

  // Called by one thread, and followed by a barrier.
  template <class Config>
  void find(const Params& params, int linear) {
    if constexpr (Config::varlen) {
      tile = varlen_tile<Config::block_m>(params, linear);
      seqlen = varlen_seqlen(params, tile.batch);
    } else {
      tile = dense_tile(params, linear);
      seqlen = dense_seqlen(params);
    }
    range = block_range<Config::block_m, Config::block_n, Config::causal, Config::window>(params, seqlen, tile.m_block);
    const int batch = Config::varlen ? 0 : tile.batch, head_k = tile.head / params.qheads_per_khead;
    const auto origin = [batch](const void* pointer, const Strides& strides, int head, int row) {
      return static_cast<const element*>(pointer) + batch * strides.batch + head * strides.head + row * strides.seqlen;
    };
    q = origin(params.q, params.q_strides, tile.head, seqlen.q_first_row);
    k = origin(params.k, params.k_strides, head_k, seqlen.k_first_row);
    v = origin(params.v, params.v_strides, head_k, seqlen.k_first_row);
    out = const_cast<element*>(origin(params.out, params.out_strides, tile.head, seqlen.q_first_row));
    lse = params.lse
              ? params.lse + batch * params.lse_batch_stride + tile.head * params.lse_head_stride + seqlen.q_first_row
              : nullptr;
  }
};

}  // namespace attention
