// attention: what a thread block works on. It lives in shared memory and is read where it is needed: the accumulators
// leave the main loop no registers to carry it in.
#pragma once

#include "attention/block_range.cuh"
#include "attention/packed.cuh"
#include "attention/params.cuh"
#include "attention/scheduler.cuh"
#include "attention/seqlen.cuh"
#include "tile/accumulator.cuh"
#include "tile/copy.cuh"

namespace attention {

// Where few rows of q would leave most of a tile empty, heads that share a key head share the tile: with Config::pack
// of them, row r of the tiles is query row r / pack of head r % pack, and `tile.head` is the key head.
template <class element>
struct Work {
  TileIndex tile;
  Seqlen seqlen;
  BlockRange range;
  element* out;  // the first row and column of the (first) head of this sequence
  float* lse;    // the same; null: not wanted

  // Whether no row is live: a slot of a packed batch that no tile needs, or the missing partner of a tile.
  template <class Config>
  constexpr bool idle() const {
    return tile.m_block * Config::block_m >= rows<Config>();
  }

  // Rows of its tiles, over the whole sequence.
  template <class Config>
  constexpr int rows() const {
    return seqlen.q * Config::pack;
  }

  template <class Config>
  element* out_row(const Params& params, int row) const {
    return out + row / Config::pack * params.out_strides.seqlen + row % Config::pack * params.out_strides.head;
  }

  template <class Config>
  float* lse_row(const Params& params, int row) const {
    return lse + row / Config::pack + row % Config::pack * params.lse_head_stride;
  }

  // Called by a warp, and followed by a barrier. Packed: with units that do not decrease, of which many in a row may be
  // `alike`, of one sequence.
  template <class Config, int groups = 2, bool alike = false>
  void find(const Params& params, PackedScan& scan, int unit, bool second) {
    if constexpr (Config::varlen) {
      const int slot = unit / params.num_heads_q;
      const bool pairs = in_pairs(params);
      if (!alike || !scan.holds<Config::block_m>(slot, pairs)) scan.find<Config::block_m, groups>(params, slot, pairs);
    }
    if (tile::lane() != 0) return;
    if constexpr (Config::varlen)
      take<Config>(params, packed_tile<Config>(params, scan.found, unit, second), packed_seqlen(params, scan.found));
    else
      take<Config>(params, dense_tile<Config>(params, unit, second), dense_seqlen(params));
  }

  // Becomes that of a tile. Called by one thread.
  template <class Config>
  void take(const Params& params, const TileIndex& its_tile, const Seqlen& its_seqlen) {
    tile = its_tile;
    seqlen = its_seqlen;
    range = block_range<Config>(params, seqlen, tile.m_block);
    const int head = tile.head * Config::pack;
    out = const_cast<element*>(origin(params.out, params.out_strides, head, seqlen.q_first_row));
    lse = params.lse
              ? params.lse + tile.batch * params.lse_batch_stride + head * params.lse_head_stride + seqlen.q_first_row
              : nullptr;
  }

  // The score of a key without a value.
  template <class Config>
  float sink(const Params& params) const {
    return Config::sinks ? params.sinks[tile.head * params.sinks_stride] : -infinity;
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
  void find(const Params& params, PackedScan& scan, int unit) {
    Work<element>::template find<Config, Config::scan_groups, Config::many>(params, scan, unit, false);
    if (tile::lane() != 0) return;
    const int head_k = this->tile.head / params.qheads_per_khead;
    q = this->origin(params.q, params.q_strides, this->tile.head, this->seqlen.q_first_row);
    k = this->origin(params.k, params.k_strides, head_k, this->seqlen.k_first_row);
    v = this->origin(params.v, params.v_strides, head_k, this->seqlen.k_first_row);
  }
};

}  // namespace attention
