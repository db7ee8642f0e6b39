// attention: what a thread block works on. A work lives in shared memory and is read where it is needed, since the
// accumulators leave the main loop no registers to carry it in.
#pragma once

#include "attention/block_range.cuh"
#include "attention/packed.cuh"
#include "attention/params.cuh"
#include "attention/row_source.cuh"
#include "attention/scheduler.cuh"
#include "attention/seqlen.cuh"
#include "tile/accumulator.cuh"
#include "tile/copy.cuh"

namespace attention {

// Where few rows of q would leave most of a tile empty, heads that share a key head share the tile: with Config::pack
// heads in a tile, row r of the tiles is query row r / pack of head r % pack, and `tile.head` is the key head.
template <class Config>
struct Work {
  using element = typename Config::element;

  TileIndex tile;
  Seqlen seqlen;
  typename Config::mask::Blocks blocks;  // of keys
  element* out;  // where `out` has the first row of the sequence, in the tile's head or the first of its heads
  float* lse;    // where lse has that row; null: lse is not wanted

  // Says whether no row of the tile is live: the tile lies past the end of its sequence or is the missing partner of
  // the one in the middle of a head.
  constexpr bool idle() const { return tile.m_block * Config::block_m >= rows(); }

  // How many rows the tiles of a head of the whole sequence have.
  constexpr int rows() const { return seqlen.q * Config::pack; }

  element* out_row(const Params& params, int row) const {
    return out + row / Config::pack * params.out_strides.seqlen + row % Config::pack * params.out_strides.head;
  }

  float* lse_row(const Params& params, int row) const {
    return lse + row / Config::pack + row % Config::pack * params.lse_head_stride;
  }

  int batch() const { return tile.batch; }

  // What keys and values are to be multiplied by.
  static constexpr float k_descale() { return 1.0f; }
  static constexpr float v_descale() { return 1.0f; }

  // Which query, of which head, a row is.
  constexpr int query_of(int row) const { return row / Config::pack; }
  constexpr int head_of(int row) const { return tile.head * Config::pack + row % Config::pack; }

  const element* query_row(const Params& params, int row) const {
    return origin(params.q, params.q_strides, head_of(row), seqlen.q_first_row + query_of(row));
  }
  const element* key_row(const Params& params, int key) const {
    return origin(params.k, params.k_strides, key_head(params, tile.head), seqlen.k_first_row + key);
  }
  const element* value_row(const Params& params, int key) const {
    return origin(params.v, params.v_strides, key_head(params, tile.head), seqlen.k_first_row + key);
  }

  // Becomes the work of a tile of a unit. A whole warp calls this, and a barrier has to follow. Of packed sequences the
  // units of a warp's calls must not decrease; `alike` says that many in a row are of one sequence.
  // `Lengths` says how long sequences are.
  template <int groups = 2, bool alike = false, class Lengths = GivenLengths>
  void find(const Params& params, PackedScan& scan, int unit, bool second) {
    if constexpr (Config::varlen) {
      const int slot = unit / params.num_heads_q;
      const bool pairs = in_pairs(params);
      if (!alike || !scan.holds<Config::block_m>(slot, pairs)) scan.find<Config::block_m, groups>(params, slot, pairs);
    }
    if (tile::lane() != 0) return;
    if constexpr (Config::varlen) {
      take(params, packed_tile<Config>(params, scan.found, unit, second), Lengths::packed(params, scan.found));
    } else {
      const TileIndex its_tile = dense_tile<Config>(params, unit, second);
      take(params, its_tile, Lengths::dense(params, its_tile.batch));
    }
  }

  // Becomes the work of a tile. One thread calls this.
  void take(const Params& params, const TileIndex& its_tile, const Seqlen& its_seqlen) {
    tile = its_tile;
    seqlen = its_seqlen;
    blocks = key_blocks<Config>(params, seqlen, tile.batch, key_head(params, tile.head), tile.m_block);
    const int head = tile.head * Config::pack;
    out = const_cast<element*>(origin(params.out, params.out_strides, head, seqlen.q_first_row));
    lse = params.lse
              ? params.lse + tile.batch * params.lse_batch_stride + head * params.lse_head_stride + seqlen.q_first_row
              : nullptr;
  }

  // The key head that a tile's head reads.
  static constexpr int key_head(const Params& params, int head) {
    return Config::pack > 1 ? head : head / params.qheads_per_khead;
  }

  // Where the tile's keys are, in k and in v.
  MappedRows keys(const Params& params) const {
    return {seqlen.k, seqlen.k_first_row, key_head(params, tile.head), tile.batch};
  }

  // The score of a key without a value.
  float sink(const Params& params) const {
    return Config::sinks ? params.sinks[tile.head * params.sinks_stride] : -infinity;
  }

  const element* origin(const void* pointer, const Strides& strides, int head, int row) const {
    return static_cast<const element*>(pointer) + tile.batch * strides.batch + head * strides.head +
           row * strides.seqlen;
  }
};

// The work of kernels that read q, k and v through pointers, which point to the first row of the sequence.
template <class Config>
struct PointerWork : Work<Config> {
  using element = typename Config::element;

  const element* q;
  const element* k;
  const element* v;

  PointedRows<element> queries(const Params& params) const { return {q, params.q_strides, this->seqlen.q}; }
  PointedRows<element> keys(const Params& params) const { return {k, params.k_strides, this->seqlen.k}; }
  PointedRows<element> values(const Params& params) const { return {v, params.v_strides, this->seqlen.k}; }

  void find(const Params& params, PackedScan& scan, int unit) {
    Work<Config>::template find<Config::scan_groups, Config::many>(params, scan, unit, false);
    if (tile::lane() != 0) return;
    const int head_k = this->tile.head / params.qheads_per_khead;
    q = this->origin(params.q, params.q_strides, this->tile.head, this->seqlen.q_first_row);
    k = this->origin(params.k, params.k_strides, head_k, this->seqlen.k_first_row);
    v = this->origin(params.v, params.v_strides, head_k, this->seqlen.k_first_row);
  }
};

}  // namespace attention
