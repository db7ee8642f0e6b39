// attention: the backward's pass over tiles of queries with wgmma, for sm_90, which gives dq; the pass that gives dk
// and dv is in backward_split_keys_sm90.cuh. A thread block takes one tile of 128 queries after the other, and with
// each goes over the blocks of keys they see. One warp finds the work, one thread loads; two warpgroups own 64 of the
// queries each, and dS, as it stands in registers, is an operand of the product that gives dq.
#pragma once

#include "attention/backward_params.cuh"
#include "attention/backward_prepare.cuh"
#include "attention/backward_rows.cuh"
#include "attention/backward_tensors_sm90.cuh"
#include "attention/backward_units_sm90.cuh"
#include "attention/block_range.cuh"
#include "attention/row_source.cuh"
#include "attention/scoring.cuh"
#include "core/math.cuh"
#include "ptx/wgmma.cuh"
#include "tile/accumulator.cuh"
#include "tile/gemm_sm90.cuh"
#include "tile/local.cuh"
#include "tile/pipeline.cuh"
#include "tile/shared.cuh"
#include "tile/turn.cuh"

namespace attention {

// What a thread block works on: a tile of queries, and the blocks of keys that it sees.
template <class Config>
struct QueryWork {
  RowTile tile;
  typename Config::mask::Blocks blocks;  // of keys
  i64 row;                               // row of the workspace where the sequence begins

  // Puts the work of a unit where the first lane of a warp writes it: the caller has few registers. A whole warp calls
  // this.
  static void find_into(QueryWork& work, const BackwardParams& backward, int unit) {
    const Params& params = backward.forward;
    // Under a causal mask tiles of the heads of a section come longest first: those of one head after the other would
    // leave SMs idle while the last head's longest are computed.
    constexpr bool longest_first = is_same<typename Config::mask, CausalMask>;
    const int section = longest_first ? params.heads_per_section * params.qheads_per_khead : 1;
    if constexpr (Config::varlen) {
      const PackedUnit found = RowTile::find_packed<Config>(backward, unit, section);
      if (tile::lane() == 0) work.take(backward, RowTile::of_packed<Config>(backward, found));
    } else {
      if (tile::lane() != 0) return;
      work.take(backward, RowTile::find<Config>(backward, unit, ceil_div(params.seqlen_q, Config::block_m), section));
    }
  }

  void take(const BackwardParams& backward, const RowTile& found) {
    const Params& params = backward.forward;
    tile = found;
    if (idle()) return;
    blocks = key_blocks<Config>(params, tile.seqlen, tile.batch, tile.head / params.qheads_per_khead, tile.m_block);
    row = workspace_row<Config>(backward, tile, tile.head);
  }

  // Where the tile's queries are, in q and in dout, and where the keys of its key head are, in k and in v.
  MappedRows queries() const { return {tile.seqlen.q, tile.seqlen.q_first_row, tile.head, tile.batch}; }
  MappedRows keys(int key_head) const { return {tile.seqlen.k, tile.seqlen.k_first_row, key_head, tile.batch}; }

  // How many units the launch has; some may be idle.
  static constexpr int units(const BackwardParams& backward) {
    constexpr int block_m = Config::block_m;
    const Params& params = backward.forward;
    const int tiles = Config::varlen ? params.seqlen_q / block_m + min_of(params.batch, params.seqlen_q)
                                     : ceil_div(params.seqlen_q, block_m) * params.batch;
    return tiles * params.num_heads_q;
  }

  // Whether no row is live.
  bool idle() const { return tile.row < 0 || tile.m_block * Config::block_m >= tile.seqlen.q; }
};

// Config with the tiles of 128 queries that this pass has.
template <class Config>
struct QueriesConfig : Config {
  static constexpr int block_m = 128;
};

template <class BaseConfig>
struct BackwardQueriesSm90 {
  using Config = QueriesConfig<BaseConfig>;
  using Work = QueryWork<Config>;
  using element = typename Config::element;
  static constexpr int block_n = Config::block_n, consumers = Config::block_m / 64;
  using Q = tile::SharedTile<element, 64, Config::tile_head_dim>;  // one for each warpgroup
  using Dout = tile::SharedTile<element, 64, Config::tile_head_dim_v>;
  using K = tile::SharedTile<element, block_n, Config::tile_head_dim>;
  using V = tile::SharedTile<element, block_n, Config::tile_head_dim_v>;

  using Variant = typename Config::variant;
  // Consumers take turns in giving the tensor cores S and dP to do.
  using Turn = tile::Turn<consumers>;

  using Scores = tile::Accumulator<1, block_n>;
  using Operand = tile::Operand<block_n>;
  using Dq = tile::Accumulator<1, round_up(Config::head_dim, 16)>;

  // As many of the first columns of q as dq leaves registers for, 320 with its own, stay in these while keys pass, as K
  // and V do in the pass over keys, and with the same exception.
  static constexpr bool holds_q = Variant::empty && Config::head_dim <= 192 && Dq::cols != block_n;
  static constexpr int held_cols = holds_q ? min_of(Dq::cols, 320 - Dq::cols) : 0;
  using HeldQ = tile::Operand<held_cols>;

  static constexpr int chain_steps = tile::chain_blocks(block_n);

  using Keys = tile::Ring<2>;
  using Values = tile::Ring<Config::value_stages>;
  using Queries = tile::Ring<1>;
  using Units = BackwardUnits<Work, query_units>;

  struct Shared {
    typename Q::Storage q[consumers];
    typename Dout::Storage dout[consumers];
    typename K::Storage k[Keys::stages];
    typename V::Storage v[Values::stages];
    Keys::Storage keys;
    typename Values::Storage values;
    Queries::Storage queries[consumers], gradients[consumers];  // of q, and of dout
    typename Units::Storage units;
  };
  static constexpr int smem_bytes = sizeof(Shared);

  u32 smem;

  Q q(int warpgroup) const { return {smem + tile::offset<&Shared::q> + warpgroup * Q::bytes}; }
  Dout dout(int warpgroup) const { return {smem + tile::offset<&Shared::dout> + warpgroup * Dout::bytes}; }
  K k(u32 stage) const { return {smem + tile::offset<&Shared::k> + stage * K::bytes}; }
  V v(u32 stage) const { return {smem + tile::offset<&Shared::v> + stage * V::bytes}; }
  Keys keys() const { return {smem + tile::offset<&Shared::keys>}; }
  Values values() const { return {smem + tile::offset<&Shared::values>}; }
  Queries queries(int warpgroup) const { return {smem + tile::offset<&Shared::queries> + warpgroup * Queries::bytes}; }
  Queries gradients(int warpgroup) const {
    return {smem + tile::offset<&Shared::gradients> + warpgroup * Queries::bytes};
  }
  Units units() const { return {smem + tile::offset<&Shared::units>}; }

  // The block of keys that a warp is at, and the tile of queries.
  using Progress = tile::CursorPair<Keys::stages>;

  void init() const {
    keys().init(4 * consumers * tile::warp_arrivals);
    values().init(4 * consumers * tile::warp_arrivals);
    for (int w = 0; w < consumers; ++w) {
      queries(w).init(4 * tile::warp_arrivals);
      gradients(w).init(4 * tile::warp_arrivals);
    }
    units().init(4 * consumers + 1);
    ptx::fence_mbarrier_init();
  }

  // Called by one thread, which loads the queries once and block after block of keys, each when it is needed: of what
  // the first products read, scores come first.
  void load(const BackwardArgument& argument, const Work& work, Progress& progress) const {
    const RowTile& tile = work.tile;
    const int head_k = tile.head / argument.params.forward.qheads_per_khead;
    Keys::Cursor& at_keys = progress.first;
    // A warpgroup whose queries all lie past the end loads none: it writes no row, whatever it computes.
    const int first_row = tile.m_block * Config::block_m, live = ceil_div(tile.seqlen.q - first_row, 64);
    const auto load_queries = [&](const auto& ring, const auto& to, const ptx::TensorMap& map, int w) {
      const Queries::Cursor at = progress.second();
      ring.wait_empty(at);
      if (w >= live) return ring.fill(at);
      ring.expect(at, to.bytes);
      load_rows<Config>(to, map, ring.full(0), first_row + 64 * w, work.queries());
    };
#pragma unroll 1
    for (int position = work.blocks.end - 1; position >= work.blocks.begin; --position) {
      const bool first = position == work.blocks.end - 1;
      const int n_block = work.blocks.block(position);
      keys().wait_empty(at_keys);
      keys().expect(at_keys, K::bytes);
      load_rows<Config>(k(at_keys.stage()), argument.k, keys().full(at_keys.stage()), n_block * block_n,
                        work.keys(head_k));
      if (first) {
        for (int w = 0; w < consumers; ++w) load_queries(queries(w), q(w), argument.q, w);
      }
      const typename Values::Cursor at_values{at_keys.count};
      values().wait_empty(at_values);
      values().expect(at_values, V::bytes);
      load_rows<Config>(v(at_values.stage()), argument.v, values().full(at_values.stage()), n_block * block_n,
                        work.keys(head_k));
      if (first) {
        for (int w = 0; w < consumers; ++w) load_queries(gradients(w), dout(w), argument.dout, w);
      }
      at_keys.advance();
    }
    if (!work.blocks.empty()) progress.advance_second();
  }

  // Called by warpgroup `consumer` of the consumers, which computes dq of its 64 queries. The last product of a block
  // of keys runs on beside the first of the next block.
  void consume(const BackwardParams& backward, const Work& work, int consumer, const Turn& turn,
               Progress& progress) const {
    const Params& params = backward.forward;
    const RowTile& tile = work.tile;
    const int first_row = tile.m_block * Config::block_m + 64 * consumer + int(threadIdx.x / 32 % 4) * 16;
    RowNumbers<1> lse, delta;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + tile::fragment_row(0, i);
      lse.x[0][i] = row < tile.seqlen.q ? backward.row_lse[work.row + row] : infinity;
      delta.x[0][i] = row < tile.seqlen.q ? backward.row_delta[work.row + row] : 0.0f;
    }
    Keys::Cursor& at_keys = progress.first;
    const u32 first_count = at_keys.count;
    Dq dq;
    Operand ds;
    tile::LocalSums<1, Dq::cols> local_dq;
    dq.zero();
    HeldQ held_q;
    if (!work.blocks.empty()) queries(consumer).wait_full(progress.second());
    if constexpr (held_cols > 0) {
      if (ptx::in_vain || !work.blocks.empty()) warpgroup::load_operand(held_q, q(consumer), 0);
    }
    const auto step = [&](int position) {
      const int first_key = work.blocks.block(position) * block_n;
      const bool first = at_keys.count == first_count;
      const typename Values::Cursor at_values{at_keys.count};
      Scores s, dp;
      keys().wait_full(at_keys);
      const bool boundary = work.blocks.template is_boundary<Config::mask::hides_first>(position);
      turn.take();
      warpgroup::gemm_abt<Config::head_dim>(s, held_q, q(consumer), k(at_keys.stage()), 0);
      if (first) gradients(consumer).wait_full(progress.second());
      values().wait_full(at_values);
      warpgroup::gemm_abt<Config::head_dim_v>(dp, dout(consumer), v(at_values.stage()));
      turn.pass(1 - consumer);
      warpgroup::wait<2>(dq, ds);
      if (!first) keys().release_warp(at_keys.previous());
      const auto where = [&] {
        return Place<Config>{params, tile.seqlen, tile.batch, tile.head, first_row, first_key};
      };
      Kept<Config, 1, block_n> kept;
      kept.find(where);  // while the products run
      warpgroup::wait<1>(s);
      const Place<Config> place = where();
      Held<Config, block_n, true> held;
      hold_probabilities(held, s, place, kept, lse, boundary);
      warpgroup::wait<0>(dp);
      values().release_warp(at_values);
      gradients_of_scores<Config, false>(ds, held.ds_factors(), held.rests, s, dp, place, kept, delta);
      warpgroup::gemm_ab(dq, ds, k(at_keys.stage()), true);
      // ptxas serialises all products if one runs across the loop's edge beside a variant's arithmetic.
      if (!Variant::empty) warpgroup::wait<0>(dq, ds);
      at_keys.advance();
    };
    const int begin = work.blocks.begin, end = work.blocks.end;
#pragma unroll 1
    for (int chain = end; chain > begin; chain = Config::chains ? chain - chain_steps : begin) {
      const int chain_begin = Config::chains ? max_of(begin, chain - chain_steps) : begin;
#pragma unroll 1
      for (int position = chain - 1; position >= chain_begin; --position) step(position);
      const bool first = chain == end, last = chain_begin == begin;
      if (last) {
        queries(consumer).release_warp(progress.second());
        gradients(consumer).release_warp(progress.second());
        progress.advance_second();
      }
      warpgroup::wait<0>(dq, ds);
      if (Config::chains && !(first && last)) local_dq.take_over(dq, first, last);
      if (last) keys().release_warp(at_keys.previous());
    }

    NotFinite<f32> not_finite;
    element* const rows = tile.rows(static_cast<element*>(backward.dq), backward.dq_strides, 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + tile::fragment_row(0, i);
      write_row<Config::store_bytes, Config::head_dim>(rows + row * backward.dq_strides.seqlen, backward.dq_strides.dim,
                                                       row < tile.seqlen.q, dq, 0, i, params.softmax_scale, not_finite);
    }
    // Queries that all lie past the end were not loaded, and may be anything.
    if (unlikely(not_finite.found()) && first_row < tile.seqlen.q) *backward.not_finite = 1;
  }
};

}  // namespace attention
