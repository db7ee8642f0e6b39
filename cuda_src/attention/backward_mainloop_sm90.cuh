// attention: the backward's main loop with wgmma, for sm_90. A thread block takes one block of K and V after the other,
// and with each goes over the tiles of queries. One warp finds the work, two load, one adds finished tiles of dq to
// those in memory; two warpgroups of consumers own 64 of the keys each.
//
// FlashAttention-2 (Dao, 2023), Algorithm 2, with transposed scores, as FlashAttention-3 has them: rows are keys, so
// that P and dS, as they stand in registers, are operands of the products that give dv and dk. Only dS goes through
// shared memory, once, for dq, of which every consumer computes some columns, or rows, over all keys of the block.
#pragma once

#include "attention/backward_params.cuh"
#include "attention/backward_rows.cuh"
#include "attention/backward_sums_sm90.cuh"
#include "attention/backward_tensors_sm90.cuh"
#include "attention/backward_units_sm90.cuh"
#include "attention/backward_work.cuh"
#include "attention/block_ahead.cuh"
#include "attention/masks.cuh"
#include "attention/scoring.cuh"
#include "attention/tile_terms.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "tile/accumulator.cuh"
#include "tile/gemm_sm90.cuh"
#include "tile/local.cuh"
#include "tile/pipeline.cuh"
#include "tile/shared.cuh"
#include "tile/turn.cuh"

namespace attention {

template <class Config>
struct BackwardMainloopSm90 {
  using element = typename Config::element;
  static constexpr int block_m = Config::block_m, block_n = Config::block_n, consumers = 2;
  static_assert(block_n == 64 * consumers, "a consumer owns 64 keys");
  using K = tile::SharedTile<element, block_n, Config::tile_head_dim>;
  using V = tile::SharedTile<element, block_n, Config::tile_head_dim_v>;
  static constexpr int key_box = Config::bias_chunks > 0 ? 64 : block_n;  // rows of the boxes of the maps of k and v
  using Q = tile::SharedTile<element, block_m, Config::tile_head_dim>;
  using Dout = tile::SharedTile<element, block_m, Config::tile_head_dim_v>;
  using Ds = tile::SharedTile<element, block_n, block_m>;

  using Variant = typename Config::variant;
  using Terms = TileTerms<Config>;  // what they stage lies behind Shared
  using Scores = tile::Accumulator<1, block_m>;
  using Operand = tile::Operand<block_m>;
  using Dk = tile::Accumulator<1, round_up(Config::head_dim, 16)>;
  using Dv = tile::Accumulator<1, round_up(Config::head_dim_v, 16)>;

  // Consumers share a tile of dq by its rows, or, where it has only 64 rows, by its columns.
  static constexpr bool by_rows = block_m == 128;
  static_assert(by_rows || block_m == 64, "64 rows of dq are a consumer's");
  using Dq = tile::Accumulator<1, by_rows ? Config::tile_head_dim : Config::tile_head_dim / 2>;
  static constexpr int dq_threads = 128 * consumers, dq_group = 128, dq_vector = 4;
  static int dq_row(int thread) { return (by_rows ? thread / 128 * 64 : 0) + thread / 32 % 4 * 16; }
  static int dq_col(int thread) { return by_rows ? 0 : thread / 128 * Dq::cols; }

  // A read of shared memory waits behind products. As far as there are registers, these hold columns of K, for the
  // whole work, and pairs of row_lse that are loaded before the products. Terms take none that only mask, as ranges do.
  static constexpr bool bounded = Config::mask::Tiles::bounded && !Variant::shapes && !Variant::scales;
  static constexpr bool roomy = (Variant::empty || bounded) && !by_rows;
  using HeldK = tile::Operand<roomy ? 32 : 0>;
  static constexpr int lse_ahead = !roomy ? 4 : bounded && Variant::hides && Config::mask::hides_first ? 6 : 8;

  // Whether works are short because of a window: of dense arrays, in no fixed order, where a tile of dq is shared by
  // its rows. It is then counted of parts of a head's blocks that they are done.
  static constexpr bool windowed =
      by_rows && is_same<typename Config::mask, WindowMask> && !Config::varlen && !Config::deterministic;
  static_assert(windowed == (Config::part_blocks > 0), "Config and the main loop disagree on windows");

  // Whether the first step of a work is compiled apart. It then begins no product in vain, and S before V has come. In
  // tiles of 128 rows there are registers for that in works of one chain, and it was found to gain where they are
  // short.
  static constexpr bool parts_first = (Variant::empty || bounded) && (!by_rows || (windowed && !Config::chains));

  // Whether sections may have heads of several packed sequences: where that was found to gain.
  static constexpr bool shares_sections =
      Config::deterministic && Config::head_dim <= 64 && Config::head_dim_v <= 64 && !Config::mask::hides_first;

  // With a second stage of keys the next work's are on their way while this one's last dq is computed from its own.
  // There is room where a tile of dq is shared by its rows, and a gain where a mask makes works short.
  static constexpr bool causal = is_same<typename Config::mask, CausalMask>;
  static constexpr int key_stages =
      windowed || (by_rows && causal && !Config::varlen && !Config::deterministic) ? 2 : 1;

  static constexpr int chain_floats = dq_threads * (Dk::cols + Dv::cols) / 2;  // of a block: dk and dv, taken over
  static constexpr bool first_stores = true;  // dq_sum begins with the first numbers stored there, not with zeros

  // Consumers take turns from S to the last exponential, so that exponentials of one run beside products of the other.
  using Turn = tile::Turn<consumers>;
  enum Barrier : u32 { consumers_barrier = Turn::next_barrier };  // named barriers, besides those of turns

  static constexpr int stages = 2;
  static constexpr int sums_stages = by_rows || Terms::crowd ? 1 : 2;  // tiles of dq, as many as there is room for
  using Ring = tile::Ring<stages>;
  using KeyRing = tile::Ring<key_stages>;
  using ValueRing = tile::Ring<1>;
  using SumsRing = tile::Ring<sums_stages>;
  static constexpr int rows_bytes = block_m * sizeof(float);  // bytes of row_lse, and of row_delta
  static constexpr int sums_bytes = block_m * Config::tile_head_dim * sizeof(float);

  struct Shared {
    typename K::Storage k[key_stages];
    typename V::Storage v;
    typename Q::Storage q[stages];
    typename Dout::Storage dout[stages];
    typename Ds::Storage ds[stages];
    float sums[sums_stages][consumers][block_m * Config::tile_head_dim / consumers];
    float lse[stages][block_m], delta[stages][block_m];
    typename Ring::Storage queries, gradients;
    typename Ring::Storage exchange;  // hands dS over
    typename Ring::Storage works;
    typename KeyRing::Storage keys;
    typename ValueRing::Storage values;
    typename ValueRing::Storage claims;  // of work
    typename SumsRing::Storage sums_rings[consumers];
  };
  using Ahead = QueriesAhead<Config>;
  static constexpr int told_offset = Terms::end(sizeof(Shared), stages);  // behind that, what consumers are told
  static constexpr int smem_bytes = told_offset + stages * Ahead::told_bytes;

  u32 smem;

  u32 told(u32 stage) const { return smem + told_offset + stage * Ahead::told_bytes; }

  u32 staged(u32 stage) const { return smem + Terms::begin(sizeof(Shared)) + stage * Terms::Tile::bytes; }
  K k(const typename KeyRing::Cursor& at) const { return {smem + tile::offset<&Shared::k> + at.stage() * K::bytes}; }
  V v(const typename KeyRing::Cursor&) const { return {smem + tile::offset<&Shared::v>}; }
  KeyRing keys(const typename KeyRing::Cursor&) const { return {smem + tile::offset<&Shared::keys>}; }
  ValueRing values(const typename KeyRing::Cursor&) const { return {smem + tile::offset<&Shared::values>}; }
  Q q(u32 stage) const { return {smem + tile::offset<&Shared::q> + stage * Q::bytes}; }
  Dout dout(u32 stage) const { return {smem + tile::offset<&Shared::dout> + stage * Dout::bytes}; }
  Ds ds(u32 stage) const { return {smem + tile::offset<&Shared::ds> + stage * Ds::bytes}; }
  u32 sums(u32 stage, int part) const {
    return smem + tile::offset<&Shared::sums> + (stage * consumers + part) * (sums_bytes / consumers);
  }
  u32 lse(u32 stage) const { return smem + tile::offset<&Shared::lse> + stage * rows_bytes; }
  u32 delta(u32 stage) const { return smem + tile::offset<&Shared::delta> + stage * rows_bytes; }
  Ring queries() const { return {smem + tile::offset<&Shared::queries>}; }
  Ring gradients() const { return {smem + tile::offset<&Shared::gradients>}; }
  Ring exchange() const { return {smem + tile::offset<&Shared::exchange>}; }
  Ring works() const { return {smem + tile::offset<&Shared::works>}; }
  ValueRing claims() const { return {smem + tile::offset<&Shared::claims>}; }
  SumsRing sums_ring(int part) const { return {smem + tile::offset<&Shared::sums_rings> + part * SumsRing::bytes}; }

  void init() const {
    constexpr int arrivals = 4 * consumers * tile::warp_arrivals;
    queries().init(arrivals);
    gradients().init(arrivals);
    exchange().init(arrivals, arrivals);
    works().init(arrivals + 3 * tile::warp_arrivals);
    keys({}).init(arrivals);
    values({}).init(arrivals);
    claims().init(1);
    for (int part = 0; part < consumers; ++part) sums_ring(part).init(1, 4 * tile::warp_arrivals);
    ptx::fence_mbarrier_init();
  }

  // The work of the thread block, two units at a time: on its way from the warp that finds it to those that do it.
  using Works = BackwardWork<Config>[stages];

  // Called by each warp that does the work: calls step(work) for every unit.
  template <class Step>
  void for_each_work(const Works& works, Step&& step) const {
    for_each_unit(this->works(), works, step);
  }

  // Called by one warp per side, which loads that side of all work.
  template <Side side>
  void load(const BackwardArgument& argument, const Works& works) const {
    TileLoader<Config, BackwardMainloopSm90, side> loader{*this, argument};
    for_each_work(works, [&](const BackwardWork<Config>& work) {
      if (tile::lane() != 0) return;
      loader.load(work);
      if (side == Side::scores) claims().release({});
    });
  }

  // Called by one warp, one thread of which adds the tiles of dq, as the consumers lay them down, to those in memory.
  void add_dq(const BackwardParams& backward, const Works& works) const {
    typename SumsRing::Cursor at;
    for_each_work(works, [&](const BackwardWork<Config>& work) {
      if (tile::lane() != 0) return;
      DqSum<Config, consumers> sum{backward};
      for_each_query_tile<Config::chains>(backward.forward, work, [&](int head, int position) {
        sum.begin(work, head, work.tiles.block(position));
        if (sums_stages > 1) give_back_sums(at);  // those of the tile before, while the answer is on its way
#pragma unroll
        for (int part = 0; part < consumers; ++part) {
          sums_ring(part).wait_full(at);
          ptx::fence_proxy_async_shared();
          if (part == 0) sum.wait();
          sum.add(sums(at.stage(), part), part);
          if (part == 0) sum.template tell<1>();
        }
        sum.end();
        at.advance();
        if (sums_stages == 1) give_back_sums(at);
      });
      const bool last = Config::finishes && (!Config::chains || work.last_chain);
      last ? sum.finish_work(work) : sum.template tell<0>();
    });
    // The block's shared memory goes with it. Who finishes work has waited for all copies from there.
    if (!Config::finishes) ptx::cp_async_bulk_wait_group_read<0>();
  }

  // Gives back the tile before `at`, once the thread's copies have read it.
  void give_back_sums(const typename SumsRing::Cursor& at) const {
    if (at.count == 0) return;
    ptx::cp_async_bulk_wait_group_read<0>();
#pragma unroll
    for (int part = 0; part < consumers; ++part) sums_ring(part).release(at.previous());
  }

  // Called by warpgroup `consumer` of the consumers. It computes its part of dq one step behind the rest: by then dS of
  // the other consumer has long been there, and while one is busy with its scores, the tensor cores work for the other.
  //
  // An access to shared memory waits until the tensor cores have begun what either consumer gave them before. Hence dS
  // is stored ahead of the products behind it, and nothing is read twice in a step.
  void consume(const BackwardParams& backward, const Works& works, int consumer) const {
    const Turn turn(consumer);
    Progress progress;
    for_each_work(works,
                  [&](const BackwardWork<Config>& work) { consume_work(backward, work, consumer, turn, progress); });
  }

  using Progress = tile::CursorPair<stages, key_stages>;  // the step that a consumer is at, and the block of keys

  void consume_work(const BackwardParams& backward, const BackwardWork<Config>& work, int consumer, const Turn& turn,
                    Progress& progress) const {
    typename Ring::Cursor& at = progress.first;
    const Params& params = backward.forward;
    const int first_key = work.n_block * block_n + 64 * consumer + int(threadIdx.x / 32 % 4) * 16;
    // One stage is asked for where it is needed, and holds no register. Of two, the work's is held.
    const typename KeyRing::Cursor held = progress.second();
    const auto at_keys = [&] { return key_stages > 1 ? held : progress.second(); };
    const auto at_values = [&] { return typename ValueRing::Cursor{at_keys().count}; };
    const auto k = [&] { return this->k(at_keys()); };
    Dk dk;
    Dv dv;
    HeldK held_k;
    dk.zero();
    dv.zero();
    if (!work.tiles.empty()) {  // else nothing is loaded
      keys(at_keys()).wait_full(at_keys());
      if (!parts_first) values(at_keys()).wait_full(at_values());
    }
    if (ptx::in_vain || !work.tiles.empty()) warpgroup::load_operand(held_k, k(), 64 * consumer);
    const u32 first_count = at.count;
    for_each_query_step<Config::chains, parts_first>(params, work, [&](int head, int position, auto parted) {
      // At the first step no dq of a step before is due.
      const bool first = parts_first ? decltype(parted)::value : at.count == first_count;
      Ahead queries_ahead;
      queries_ahead.ask(work.tiles, position);
      int m_block = queries_ahead.block(work.tiles, position);
      const u32 stage = at.stage();
      Scores s, dp;
      Dq dq;
      const auto where = [&] {
        return TransposedPlace<Config>{params, work.seqlen, work.batch, head, first_key, m_block * block_m};
      };
      Kept<Config, 1, block_m> kept;
      kept.find(where);  // while products run that were begun before, the other consumer's at least
      queries().wait_full(at);
      queries_ahead.hear(told(stage));
      m_block = queries_ahead.block(work.tiles, position);
      const bool boundary = queries_ahead.is_boundary(work.tiles, position);
      ColumnNumbers<block_m> numbers;
      numbers.load(lse(stage), 0, lse_ahead);
      typename Terms::Ahead ahead;
      Terms::load(ahead, staged(stage), where);
      queries_ahead.ask_bounds(params, first_key + tile::fragment_row(0, 0));
      turn.take();
      warpgroup::gemm_abt<Config::head_dim>(s, held_k, k(), q(stage), 64 * consumer);
      const auto begin_dp = [&] {
        if (parts_first && first) values(at_keys()).wait_full(at_values());
        gradients().wait_full(at);
        warpgroup::gemm_abt<Config::head_dim_v>(dp, v(at_keys()), dout(stage), 64 * consumer);
      };
      // Derivatives and masks, and most gradients of terms, need the registers of dP.
      constexpr bool light = Variant::loading == 1 && Variant::light && !Variant::bends && !Variant::scales && !by_rows;
      constexpr bool unshaped = (!Variant::shapes || light) && (!Variant::hides || bounded);
      // But what bends scores takes so long that dP had better run beside it, and narrow tiles leave registers.
      constexpr bool alone = !(Variant::hides || Variant::scales || Variant::has_gradient || Variant::pairs);
      constexpr bool early_dp = unshaped || (alone && (Variant::bends || Config::head_dim <= 64));
      if (early_dp) begin_dp();
      ahead.arrange();
      warpgroup::wait<early_dp>(s);
      Held<Config, block_m, one_pass_exact<Config>> held;
      Operand ds;
      numbers.load(lse(stage), lse_ahead);
      const TransposedPlace<Config> place = where();
      if (bounded && unlikely(boundary)) queries_ahead.mask(s, place);
      hold_probabilities(held, s, place, kept, numbers, boundary && !bounded, ahead);
      if (!early_dp) begin_dp();
      turn.pass(1 - consumer);
      warpgroup::gemm_ab(dv, held.weights, dout(stage), true);
      warpgroup::wait<1>(dp);
      numbers.load(delta(stage));
      gradients_of_scores<Config, true>(ds, held.ds_factors(), held.rests, s, dp, place, kept, numbers);
      exchange().wait_empty(at);
      store_transposed(this->ds(stage), ds, 64 * consumer);
      if (!first) exchange().wait_full(at.previous());
      if ((ptx::in_vain && !parts_first) || !first) begin_dq(dq, k(), at.previous(), consumer);
      warpgroup::gemm_ab(dk, ds, q(stage), true);
      ptx::fence_proxy_async_shared();
      exchange().fill_warp(at);
      warpgroup::wait<1>(dv, dq, held.weights);
      gradients().release_warp(at);
      if (!first) lay_down(dq, consumer, at.previous());
      warpgroup::wait<0>(dk, ds);
      queries().release_warp(at);
      at.advance();
    });
    if (parts_first ? !work.tiles.empty() : at.count != first_count) {  // the loop holds what it compares anyway
      Dq dq;
      values(at_keys()).release_warp(at_values());
      exchange().wait_full(at.previous());
      begin_dq(dq, k(), at.previous(), consumer);
      warpgroup::wait<0>(dq);
      keys(at_keys()).release_warp(at_keys());
      lay_down(dq, consumer, at.previous());
      progress.advance_second();
    }
    if (Config::chains && unlikely(!(work.first_chain && work.last_chain))) {
      float* const chains = backward.chains + i64(blockIdx.x) * chain_floats + threadIdx.x - 128;
      tile::take_over<dq_threads>(dk, chains, work.first_chain, work.last_chain);
      tile::take_over<dq_threads>(dv, chains + dq_threads * Dk::cols / 2, work.first_chain, work.last_chain);
      if (!work.last_chain) return;
    }
    write_keys<Config, false>(backward, work, dk, first_key);
    write_keys<Config, true>(backward, work, dv, first_key);
  }

  void begin_dq(Dq& dq, const K& k, const typename Ring::Cursor& at, int consumer) const {
    warpgroup::gemm_atb(dq, ds(at.stage()), k, by_rows ? 64 * consumer : 0, by_rows ? 0 : Dq::cols * consumer);
  }

  // Lays a part of a finished tile of dq down for the thread that adds it up, and gives back the dS that it came from.
  void lay_down(const Dq& dq, int part, const typename Ring::Cursor& at) const {
    exchange().release_warp(at);
    const typename SumsRing::Cursor at_sums{at.count};
    sums_ring(part).wait_empty(at_sums);
    const u32 to = sums(at_sums.stage(), part) + threadIdx.x % 128 * sizeof(float4);
#pragma unroll
    for (int j = 0; j < Dq::n_tiles; ++j) {
      const float (&x)[4] = dq.x[0][j];
      ptx::st_shared_v4(to + j * 128 * sizeof(float4), uint4{__float_as_uint(x[0]), __float_as_uint(x[1]),
                                                             __float_as_uint(x[2]), __float_as_uint(x[3])});
    }
    sums_ring(part).fill_warp(at_sums);
  }
};

}  // namespace attention
