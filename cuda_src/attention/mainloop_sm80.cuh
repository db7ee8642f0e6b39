// attention: the forward main loop with mma.sync and cp.async, for sm_80 and every newer GPU.
// FlashAttention-2 (Dao, 2023), Algorithm 1: every warp owns whole rows of the tile, so the softmax stays within a
// warp.
#pragma once

#include "attention/block_range.cuh"
#include "attention/chains.cuh"
#include "attention/params.cuh"
#include "attention/row_source.cuh"
#include "attention/scoring.cuh"
#include "attention/softmax_sm80.cuh"
#include "attention/work.cuh"
#include "core/math.cuh"
#include "ptx/cp_async.cuh"
#include "tile/accumulator.cuh"
#include "tile/copy.cuh"
#include "tile/gemm.cuh"
#include "tile/local.cuh"
#include "tile/shared.cuh"

namespace attention {

template <class Config>
struct MainloopSm80 {
  using element = typename Config::element;
  using Q = tile::SharedTile<element, Config::block_m, Config::tile_head_dim>;
  using K = tile::SharedTile<element, Config::block_n, Config::tile_head_dim>;
  using V = tile::SharedTile<element, Config::block_n, Config::tile_head_dim_v>;

  static constexpr int warps = Config::num_threads / 32;
  static constexpr int row_warps = warps / Config::column_warps;
  static constexpr int m_tiles = Config::block_m / (16 * row_warps);
  static_assert(m_tiles * 16 * row_warps == Config::block_m, "warps share the rows of the tile evenly");

  // Warps that share rows split the columns of V, in whole panels, and each computes those rows' scores for itself.
  static constexpr int warp_cols =
      Config::column_warps == 1 ? round_up(Config::head_dim_v, 16) : V::cols / Config::column_warps;
  static_assert(Config::column_warps == 1 || warp_cols * int(sizeof(element)) % V::panel_bytes == 0,
                "a warp's columns of V must be whole panels");

  using Scores = tile::Accumulator<m_tiles, Config::block_n>;
  using Out = tile::Accumulator<m_tiles, warp_cols>;
  using Statistics = SoftmaxSm80<element, m_tiles>;
  static constexpr int chain_blocks = tile::chain_blocks(Config::block_n);

  // Whether exponentials run beside P·V, step by step: it takes probabilities as they are.
  static constexpr bool beside = !is_same<element, f32> && !Config::variant::weighs && !Config::variant::drops;

  struct Shared {
    typename Q::Storage q;
    typename K::Storage k[Config::stages];
    typename V::Storage v[Config::stages];
  };
  static constexpr int smem_bytes = sizeof(Shared);

  static int warp_row() { return int(threadIdx.x / 32 % row_warps) * 16 * m_tiles; }
  static int warp_col() { return int(threadIdx.x / 32 / row_warps) * warp_cols; }

  // Sets out and its statistics to the sums over the work's blocks, of which there is one at least, last block first.
  // With one stage K and V have one buffer each: a V arrives while Q·Kᵀ runs, or, with Config::early_v, the first V
  // with the first K; the next K arrives while the softmax and P·V run. With two stages both arrive during the whole
  // block before, and one barrier a block is enough.
  static void run(Out& out, Statistics& statistics, const Params& params, const PointerWork<Config>& work, u32 smem) {
    const Q q{smem + tile::offset<&Shared::q>};
    const auto& blocks = work.blocks;
    const auto first_row = [&work] { return work.tile.m_block * Config::block_m; };
    const typename Config::variant variant(params, work.tile.batch, work.tile.head);
    const float scale = exponent_scale<typename Config::variant>(params);

    const int last = blocks.end - 1;
    load_chunks<Config, Config::head_dim>(find_chunks<Config>(q, first_row(), work.queries(params)));
    if constexpr (Config::held_cols > 0) ptx::cp_async_commit_group();
    load_chunks<Config, Config::head_dim>(key_chunks(k_of(smem, last), params, work, blocks.block(last)));
    if constexpr (Config::early_v || Config::stages > 1) {
      const int first_col = blocks.block(last) * Config::block_n;
      load_chunks<Config, Config::head_dim_v>(find_chunks<Config>(v_of(smem, last), first_col, work.values(params)));
    }
    ptx::cp_async_commit_group();
    out.zero();
    statistics.init();
    tile::Operand<Config::held_cols> held;
    if constexpr (Config::held_cols > 0) {
      ptx::cp_async_wait_group<1>();
      __syncthreads();  // Q has arrived
      warp::load_operand(held, q, warp_row());
    }
    Chains<Config::chains, element, m_tiles, Out::cols> chains;
#pragma unroll 1
    for (int position = last; position >= blocks.begin; --position) {
      const int first_col = blocks.block(position) * Config::block_n;
      const K k = k_of(smem, position);
      const V v = v_of(smem, position);
      Scores scores;
      if constexpr (Config::stages > 1) {
        // Behind the last block no row is live: a branch around the copies would part the products.
        const int next_col = blocks.block_before(position) * Config::block_n;
        auto next_keys = work.keys(params);
        auto next_values = work.values(params);
        if (position == blocks.begin) next_keys.length = next_values.length = next_col;
        const auto next_k_chunks = find_chunks<Config>(k_of(smem, position - 1), next_col, next_keys);
        const auto next_v_chunks = find_chunks<Config>(v_of(smem, position - 1), next_col, next_values);
        ptx::cp_async_wait_group<0>();
        __syncthreads();  // this block's K and V have arrived, and every warp is done with the other buffers
        warp::gemm_abt<Config::head_dim>(scores, held, q, k, warp_row(), 0, [&] {
          load_chunks<Config, Config::head_dim>(next_k_chunks);
          load_chunks<Config, Config::head_dim_v>(next_v_chunks);
        });
        ptx::cp_async_commit_group();
      } else {
        const auto v_chunks = find_chunks<Config>(v, first_col, work.values(params));
        ptx::cp_async_wait_group<0>();
        __syncthreads();  // this block's K has arrived, and every warp is done with V
        warp::gemm_abt<Config::head_dim>(scores, held, q, k, warp_row(), 0, [&] {
          if (!Config::early_v || position != last) load_chunks<Config, Config::head_dim_v>(v_chunks);
        });
        ptx::cp_async_commit_group();

        const auto next_k_chunks = key_chunks(k, params, work, blocks.block_before(position));
        ptx::cp_async_wait_group<0>();
        __syncthreads();  // V has arrived, and every warp is done with K
        if (position > blocks.begin) load_chunks<Config, Config::head_dim>(next_k_chunks);
        ptx::cp_async_commit_group();
      }
      const Place<Config> place{params,   work.seqlen, work.tile.batch, work.tile.head, first_row() + warp_row(),
                                first_col};
      const bool boundary = blocks.template is_boundary<Config::mask::hides_first>(position);
      if (Config::variant::pairs && boundary) mask(variant, scores, place);
      apply(variant, scores, place);
      if (boundary) mask(variant, scores, place);
      if constexpr (beside) {
        const bool stepped = statistics.follow_all(scores, scale);
        if (!Config::votes || __any_sync(0xffffffffu, stepped)) statistics.rescale_all(out);
        typename Statistics::Exponents exponents(statistics, scale);
        warp::gemm_ab(out, scores, v, warp_col(), [&](int step) { exponents.take(scores, step); });
        exponents.finish();
      } else {
#pragma unroll
        for (int t = 0; t < m_tiles; ++t) {
          statistics.update(scores, out, scale, t);
        }
        weigh(variant, scores, place);
        warp::gemm_ab(out, scores, v, warp_col());
      }
      const int done = blocks.end - position;
      const bool ends = position == blocks.begin;
      if (Config::chains && unlikely(ends ? done > chain_blocks : done % chain_blocks == 0)) {
        chains.end(out, statistics, scale, done == chain_blocks, ends);
        if (!ends) statistics.init();
      }
    }
  }

  // The buffers of the block at a position.
  static K k_of(u32 smem, int position) {
    return {smem + tile::offset<&Shared::k> + u32(position) % Config::stages * K::bytes};
  }
  static V v_of(u32 smem, int position) {
    return {smem + tile::offset<&Shared::v> + u32(position) % Config::stages * V::bytes};
  }

  static auto key_chunks(const K& k, const Params& params, const PointerWork<Config>& work, int n_block) {
    return find_chunks<Config>(k, n_block * Config::block_n, work.keys(params));
  }
};

}  // namespace attention
