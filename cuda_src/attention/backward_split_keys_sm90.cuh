// attention: the backward's pass over blocks of keys with wgmma, for sm_90 and head_dims for which dk, dv and dq do not
// fit a thread block's registers together. A thread block takes one block of 64 keys after the other, and with each
// goes over the tiles of queries. One warp finds the work, two load. Of two warpgroups one computes P and dv, the other
// dP, dS and dk; P goes from one to the other through shared memory.
#pragma once

#include "attention/backward_params.cuh"
#include "attention/backward_rows.cuh"
#include "attention/backward_tensors_sm90.cuh"
#include "attention/backward_units_sm90.cuh"
#include "attention/backward_work.cuh"
#include "attention/loaded.cuh"
#include "attention/scoring.cuh"
#include "core/math.cuh"
#include "ptx/math.cuh"
#include "ptx/shared.cuh"
#include "ptx/wgmma.cuh"
#include "tile/accumulator.cuh"
#include "tile/gemm_sm90.cuh"
#include "tile/local.cuh"
#include "tile/pipeline.cuh"
#include "tile/shared.cuh"

namespace attention {

template <class Config>
struct BackwardKeysSm90 {
  using element = typename Config::element;
  static constexpr int block_m = Config::block_m, block_n = Config::block_n;
  static_assert(block_m == 64 && block_n == 64, "a warpgroup's accumulators have 64 rows");
  using K = tile::SharedTile<element, block_n, Config::tile_head_dim>;
  using V = tile::SharedTile<element, block_n, Config::tile_head_dim_v>;
  static constexpr int key_box = block_n;
  using Q = tile::SharedTile<element, block_m, Config::tile_head_dim>;
  using Dout = tile::SharedTile<element, block_m, Config::tile_head_dim_v>;

  using Variant = typename Config::variant;
  static_assert(!Variant::reads_score, "the warpgroup that tells terms their gradients has no scores");
  using Scores = tile::Accumulator<1, block_m>;
  using Operand = tile::Operand<block_m>;
  using Dk = tile::Accumulator<1, round_up(Config::head_dim, 16)>;
  using Dv = tile::Accumulator<1, round_up(Config::head_dim_v, 16)>;

  // Where dk and dv leave registers for them, all of K and V stay in these while tiles of queries pass. Read from
  // shared memory at every step they would be a fifth of what that is asked for, and its bandwidth bounds this pass.
  // But not beside a product as wide as theirs: NVRTC 12.9 and 13.0 then give P or dS, of that one, the same registers.
  static constexpr bool leaves_registers = Variant::empty && max_of(Config::head_dim, Config::head_dim_v) <= 192;
  static constexpr bool holds_k = leaves_registers && Dv::cols != block_m;
  static constexpr bool holds_v = leaves_registers && Dk::cols != block_m;
  using HeldK = tile::Operand<holds_k ? Dk::cols : 0>;
  using HeldV = tile::Operand<holds_v ? Dv::cols : 0>;

  static constexpr int chain_steps = tile::chain_blocks(block_m);

  static constexpr int stages = 2;
  using Ring = tile::Ring<stages>;
  using KeyRing = tile::Ring<1>;
  using Units = BackwardUnits<BackwardWork<Config>, key_units>;
  static constexpr int rows_bytes = block_m * sizeof(float);  // bytes of row_lse, and of row_delta

  // What goes from one warpgroup to the other takes two operands: either factors in float32, or factors and rests.
  using Handed = Held<Config, block_m, !Variant::holds>;
  using Factors = typename Handed::Factors;
  static constexpr int operand_bytes = 128 * sizeof(Operand), exchanged_bytes = 2 * operand_bytes;
  static_assert(sizeof(Factors) == (Variant::holds ? 1 : 2) * sizeof(Operand));

  struct Ahead {
    static constexpr int told_bytes = 0;  // consumers ask lists themselves
  };

  struct Shared {
    typename K::Storage k;
    typename V::Storage v;
    typename Q::Storage q[stages];
    typename Dout::Storage dout[stages];
    Operand ds_factors[stages][2][128];  // one for each thread of a warpgroup
    float lse[stages][block_m], delta[stages][block_m];
    typename Ring::Storage queries, gradients;
    typename Ring::Storage exchange;  // of ds_factors
    typename KeyRing::Storage keys, values;
    typename Units::Storage units;
  };
  static constexpr int smem_bytes = sizeof(Shared);

  u32 smem;

  K k() const { return {smem + tile::offset<&Shared::k>}; }
  V v() const { return {smem + tile::offset<&Shared::v>}; }
  Q q(u32 stage) const { return {smem + tile::offset<&Shared::q> + stage * Q::bytes}; }
  Dout dout(u32 stage) const { return {smem + tile::offset<&Shared::dout> + stage * Dout::bytes}; }
  u32 ds_factors(u32 stage) const { return smem + tile::offset<&Shared::ds_factors> + stage * exchanged_bytes; }
  u32 rests(u32 stage) const { return ds_factors(stage) + operand_bytes; }
  u32 lse(u32 stage) const { return smem + tile::offset<&Shared::lse> + stage * rows_bytes; }
  u32 delta(u32 stage) const { return smem + tile::offset<&Shared::delta> + stage * rows_bytes; }
  Ring queries() const { return {smem + tile::offset<&Shared::queries>}; }
  Ring gradients() const { return {smem + tile::offset<&Shared::gradients>}; }
  Ring exchange() const { return {smem + tile::offset<&Shared::exchange>}; }
  KeyRing keys() const { return {smem + tile::offset<&Shared::keys>}; }
  KeyRing values() const { return {smem + tile::offset<&Shared::values>}; }

  Units units() const { return {smem + tile::offset<&Shared::units>}; }

  // The step that a warp is at, and the block of keys, for which there is one place.
  using Progress = tile::CursorPair<stages>;
  K k(KeyRing::Cursor) const { return k(); }
  V v(KeyRing::Cursor) const { return v(); }
  KeyRing keys(KeyRing::Cursor) const { return keys(); }
  KeyRing values(KeyRing::Cursor) const { return values(); }

  void init() const {
    constexpr int arrivals = 4 * tile::warp_arrivals;  // arrivals of a warpgroup
    queries().init(2 * arrivals);
    gradients().init(2 * arrivals);
    exchange().init(arrivals, arrivals);
    keys().init(arrivals);
    values().init(arrivals);
    units().init(2 * 4 + 2);
    ptx::fence_mbarrier_init();
  }

  // Called by the first consumer, which computes S, P and dv. A step's last product runs on beside the next step's
  // first.
  void consume_scores(const BackwardParams& backward, const BackwardWork<Config>& work, Progress& progress) const {
    const Params& params = backward.forward;
    const int first_key = work.n_block * block_n + int(threadIdx.x / 32 % 4) * 16;
    typename Ring::Cursor& at = progress.first;
    const u32 first_count = at.count;
    Dv dv;
    Operand p;
    tile::LocalSums<1, Dv::cols> local_dv;
    HeldK held_k;
    dv.zero();
    if (!work.tiles.empty()) keys().wait_full(progress.second());
    if constexpr (holds_k) hold(held_k, k(), keys(), progress.second(), work.tiles.empty());
    const auto step = [&](int head, int position) {
      const int m_block = work.tiles.block(position);
      Scores s;
      ColumnNumbers<block_m> numbers;
      const bool boundary = work.tiles.is_boundary(position);
      queries().wait_full(at);
      numbers.load(lse(at.stage()));
      warpgroup::gemm_abt<Config::head_dim>(s, held_k, k(), q(at.stage()), 0);
      warpgroup::wait<1>(dv, p);
      if (at.count != first_count) gradients().release_warp(at.previous());
      const auto where = [&] {
        return TransposedPlace<Config>{params, work.seqlen, work.batch, head, first_key, m_block * block_m};
      };
      Kept<Config, 1, block_m> kept;
      kept.find(where);  // while the product runs
      warpgroup::wait<0>(s);
      Handed held;
      const TransposedPlace<Config> place = where();
      exchange().wait_empty(at);
      // Factors in float32 are given column by column, beside the exponentials of those that follow.
      const u32 to = ds_factors(at.stage());
      hold_probabilities(held, s, place, kept, numbers, boundary, LoadedNow{}, [&](int i, int j) {
        if constexpr (!Variant::holds) {
          if (i == 1) give_column(held.ds_factors(), to, j);
        }
      });
      p = held.weights;
      if constexpr (Variant::holds) {
        give(held.ds_factors(), to);
        give(held.rests, rests(at.stage()));
      }
      exchange().fill_warp(at);
      gradients().wait_full(at);
      warpgroup::gemm_ab(dv, p, dout(at.stage()), true);
      queries().release_warp(at);
      at.advance();
    };
    for_each_query_chain<Config::chains>(params, work, chain_steps, step, [&](bool first, bool last) {
      warpgroup::wait<0>(dv, p);
      if (Config::chains && !(first && last)) local_dv.take_over(dv, first, last);
    });
    if (!work.tiles.empty()) {
      if (!holds_k) keys().release_warp(progress.second());
      gradients().release_warp(at.previous());
      progress.advance_second();
    }
    write_keys<Config, true>(backward, work, dv, first_key);
  }

  // Called by the second consumer, which computes dP, dS and dk.
  void consume_gradients(const BackwardParams& backward, const BackwardWork<Config>& work, Progress& progress) const {
    const Params& params = backward.forward;
    const int first_key = work.n_block * block_n + int(threadIdx.x / 32 % 4) * 16;
    typename Ring::Cursor& at = progress.first;
    const u32 first_count = at.count;
    Dk dk;
    Operand ds;
    tile::LocalSums<1, Dk::cols> local_dk;
    HeldV held_v;
    dk.zero();
    if (!work.tiles.empty()) values().wait_full(progress.second());
    if constexpr (holds_v) hold(held_v, v(), values(), progress.second(), work.tiles.empty());
    const auto step = [&](int head, int position) {
      Scores dp;
      ColumnNumbers<block_m> numbers;
      gradients().wait_full(at);
      numbers.load(delta(at.stage()));
      warpgroup::gemm_abt<Config::head_dim_v>(dp, held_v, v(), dout(at.stage()), 0);
      warpgroup::wait<1>(dk, ds);
      if (at.count != first_count) queries().release_warp(at.previous());
      const auto where = [&] {
        return TransposedPlace<Config>{params, work.seqlen, work.batch,
                                       head,   first_key,   work.tiles.block(position) * block_m};
      };
      Kept<Config, 1, block_m> kept;  // drawn once more, rather than handed over
      kept.find(where);
      warpgroup::wait<0>(dp);
      Factors its_factors;
      typename Handed::Rests its_rests;
      exchange().wait_full(at);
      take(its_factors, ds_factors(at.stage()));
      if constexpr (Variant::holds) take(its_rests, rests(at.stage()));
      exchange().release_warp(at);
      const TransposedPlace<Config> place = where();
      gradients_of_scores<Config, true>(ds, its_factors, its_rests, dp, dp, place, kept, numbers);
      queries().wait_full(at);
      warpgroup::gemm_ab(dk, ds, q(at.stage()), true);
      gradients().release_warp(at);
      at.advance();
    };
    for_each_query_chain<Config::chains>(backward.forward, work, chain_steps, step, [&](bool first, bool last) {
      warpgroup::wait<0>(dk, ds);
      if (Config::chains && !(first && last)) local_dk.take_over(dk, first, last);
    });
    if (!work.tiles.empty()) {
      if (!holds_v) values().release_warp(progress.second());
      queries().release_warp(at.previous());
      progress.advance_second();
    }
    write_keys<Config, false>(backward, work, dk, first_key);
  }

  // held ← all of a tile of keys, which is given back; neither if there is none. An arrival does not wait for ldmatrix
  // before it, and the copy that it lets begin might overwrite what is still to be read: hence the fence.
  template <class Held, class Tile>
  static void hold(Held& held, const Tile& tile, const KeyRing& ring, const KeyRing::Cursor& at, bool none) {
    if (ptx::in_vain || !none) warpgroup::load_operand(held, tile, 0);
    if (none) return;
    ptx::fence_proxy_async_shared();
    ring.release_warp(at);
  }

  // Each thread of one warpgroup gives to the same thread of the other, since the two hold the same entries.
  static void give(const Operand& from, u32 to) {
#pragma unroll
    for (int step = 0; step < block_m / 16; ++step) {
      const u32(&x)[4] = from.x[step];
      ptx::st_shared_v4(place_of(to, step), uint4{x[0], x[1], x[2], x[3]});
    }
  }

  static void give_column(const Scores& from, u32 to, int j) {
    const float (&x)[4] = from.x[0][j];
    ptx::st_shared_v4(place_of(to, j), uint4{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                                             __float_as_uint(x[3])});
  }

  static void take(Operand& to, u32 from) {
#pragma unroll
    for (int step = 0; step < block_m / 16; ++step) {
      const uint4 x = ptx::ld_shared_v4(place_of(from, step));
      to.x[step][0] = x.x;
      to.x[step][1] = x.y;
      to.x[step][2] = x.z;
      to.x[step][3] = x.w;
    }
  }

  static void take(Scores& to, u32 from) {
#pragma unroll
    for (int j = 0; j < block_m / 8; ++j) {
      const uint4 x = ptx::ld_shared_v4(place_of(from, j));
      to.x[0][j][0] = __uint_as_float(x.x);
      to.x[0][j][1] = __uint_as_float(x.y);
      to.x[0][j][2] = __uint_as_float(x.z);
      to.x[0][j][3] = __uint_as_float(x.w);
    }
  }

  static u32 place_of(u32 exchanged, int chunk) { return exchanged + (chunk * 128 + threadIdx.x % 128) * 16; }
};

}  // namespace attention
