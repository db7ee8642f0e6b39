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
  element* out;  // the first row and column of this head of this sequence
  float* lse;    // the same; null: not wanted

  // Whether no row is live: a slot of a packed batch that no tile needs, or the missing partner of a tile.
  template <class Config>
  bool idle() const {
    return tile.m_block * Config::block_m >= seqlen.q;
  }

  // Called by one thread, and followed by a barrier.
  template <class Config>
  void find(const Params& params, int unit, bool second) {
    if constexpr (Config::varlen) {
      tile = varlen_tile<Config::block_m>(params, unit);
      seqlen = varlen_seqlen(params, tile.batch);
    } else {
      tile = dense_tile(params, unit, second);
      seqlen = dense_seqlen(params);
    }
    range = block_range<Config::block_m, Config::block_n, Config::causal, Config::window>(params, seqlen, tile.m_block);
    out = const_cast<element*>(origin(params.out, params.out_strides, tile.head, seqlen.q_first_row));
    lse = params.lse ? params.lse + tile.batch * params.lse_batch_stride + tile.head * params.lse_head_stride +
                           seqlen.q_first_row
                     : nullptr;
  }

  const element* origin(const void* pointer, const Strides& strides, int head, int row) const {
    return static_cast<const element*>(pointer) + tile.batch * strides.batch + head * strides.head +
           row * strides.seqlen;
  }
};

// The same for kernels that read q, k and v through pointers.
template <class element>
struct PointerWork : Work<element> {
  const element* q;
  const element* k;
  const element* v;

  template <class Config>
  void find(const Params& params, int unit) {
    Work<element>::template find<Config>(params, unit, false);
    const int head_k = this->tile.head / params.qheads_per_khead;
    q = this->origin(params.q, params.q_strides, this->tile.head, this->seqlen.q_first_row);
    k = this->origin(params.k, params.k_strides, head_k, this->seqlen.k_first_row);
    v = this->origin(params.v, params.v_strides, head_k, this->seqlen.k_first_row);
  }
};

}  // namespace attention
