// attention: the forward main loop with mma.sync and cp.async, for sm_80 and every newer GPU.
// FlashAttention-2 (Dao, 2023), Algorithm 1: every warp owns whole rows of the tile, so the softmax stays within a
// warp.
#pragma once

#include "attention/block_range.cuh"
#include "attention/chains.cuh"
#include "attention/params.cuh"
#include "attention/row_source.cuh"
#include "attention/scoring.cuh"
#include "attention/softmax.cuh"
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
  using Statistics = Softmax<element, m_tiles>;
  static constexpr int chain_blocks = tile::chain_blocks(Config::block_n);

  struct Shared {
    typename Q::Storage q;
    typename K::Storage k;
    typename V::Storage v;
  };
  static constexpr int smem_bytes = sizeof(Shared);

  static int warp_row() { return int(threadIdx.x / 32 % row_warps) * 16 * m_tiles; }
  static int warp_col() { return int(threadIdx.x / 32 / row_warps) * warp_cols; }

  // Sets out and its statistics to the sums over the work's blocks, of which there is one at least, last block first. K
  // and V have one buffer each: a V arrives while Q·Kᵀ runs, or, with Config::early_v, the first V with the first K;
  // the next K arrives while the softmax and P·V run.
  static void run(Out& out, Statistics& statistics, const Params& params, const PointerWork<Config>& work, u32 smem) {
    const Q q{smem + tile::offset<&Shared::q>};
    const K k{smem + tile::offset<&Shared::k>};
    const V v{smem + tile::offset<&Shared::v>};
    const auto& blocks = work.blocks;
    const auto first_row = [&work] { return work.tile.m_block * Config::block_m; };
    const typename Config::variant variant(params, work.tile.batch, work.tile.head);
    const float scale = exponent_scale<typename Config::variant>(params);

    load_chunks<Config, Config::head_dim>(find_chunks<Config>(q, first_row(), work.queries(params)));
    load_chunks<Config, Config::head_dim>(key_chunks(k, params, work, blocks.block(blocks.end - 1)));
    if constexpr (Config::early_v) {
      const int first_col = blocks.block(blocks.end - 1) * Config::block_n;
      load_chunks<Config, Config::head_dim_v>(find_chunks<Config>(v, first_col, work.values(params)));
    }
    ptx::cp_async_commit_group();
    out.zero();
    statistics.init();
    Chains<Config::chains, element, m_tiles, Out::cols> chains;
#pragma unroll 1
    for (int position = blocks.end - 1; position >= blocks.begin; --position) {
      const int first_col = blocks.block(position) * Config::block_n;
      Scores scores;
      const auto v_chunks = find_chunks<Config>(v, first_col, work.values(params));
      ptx::cp_async_wait_group<0>();
      __syncthreads();  // this block's K has arrived, and every warp is done with V
      if (!Config::early_v || position != blocks.end - 1) load_chunks<Config, Config::head_dim_v>(v_chunks);
      ptx::cp_async_commit_group();
      warp::gemm_abt<Config::head_dim>(scores, q, k, warp_row());

      const auto next_k_chunks = key_chunks(k, params, work, blocks.block_before(position));
      ptx::cp_async_wait_group<0>();
      __syncthreads();  // V has arrived, and every warp is done with K
      if (position > blocks.begin) load_chunks<Config, Config::head_dim>(next_k_chunks);
      ptx::cp_async_commit_group();
      const Place<Config> place{params,   work.seqlen, work.tile.batch, work.tile.head, first_row() + warp_row(),
                                first_col};
      apply(variant, scores, place);
      if (blocks.template is_boundary<Config::mask::hides_first>(position)) mask(variant, scores, place);
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) {
        statistics.update(scores, out, scale, t);
      }
      weigh(variant, scores, place);
      warp::gemm_ab(out, scores, v, warp_col());
      const int done = blocks.end - position;
      const bool last = position == blocks.begin;
      if (Config::chains && unlikely(last ? done > chain_blocks : done % chain_blocks == 0)) {
        chains.end(out, statistics, scale, done == chain_blocks, last);
        if (!last) statistics.init();
      }
    }
  }

  static auto key_chunks(const K& k, const Params& params, const PointerWork<Config>& work, int n_block) {
    return find_chunks<Config>(k, n_block * Config::block_n, work.keys(params));
  }
};

}  // namespace attention
