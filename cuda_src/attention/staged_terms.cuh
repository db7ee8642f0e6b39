// attention: what score terms read for a block of keys, which a warp of its own brings to shared memory ahead of who
// computes.
#pragma once

#include "attention/loaded.cuh"
#include "attention/params.cuh"
#include "attention/scheduler.cuh"
#include "attention/scoring.cuh"
#include "attention/variant.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "tile/accumulator.cuh"
#include "tile/pipeline.cuh"

namespace attention {

// The place of it in shared memory: barriers, and behind them, where the swizzle begins anew, a tile for each stage;
// nothing unless Config::stages_terms.
template <class Config>
struct StagedTerms {
  using Variant = typename Config::variant;
  using Stages = typename Choose<Config::stages_terms, Variant, attention::Variant<>>::type;
  using Tile = typename Stages::template Staged<Config::block_m, Config::block_n>;
  using Ring = tile::Ring<Config::stages>;
  static constexpr int alignment = 1024;

  // Where it ends if it begins at an offset.
  static constexpr int end(int begin) {
    return Config::stages_terms ? round_up(begin + Ring::bytes, alignment) + Config::stages * Tile::bytes : begin;
  }

  u32 base;

  Ring ring() const { return {base}; }
  u32 tile(u32 stage) const { return round_up(base + Ring::bytes, alignment) + stage * Tile::bytes; }

  // `warps` ask for it.
  void init(int warps) const {
    constexpr int copies = Tile::copied > 0;
    if constexpr (Config::stages_terms) ring().init(warps * tile::warp_arrivals, tile::warp_arrivals + copies);
  }

  // Called by all lanes of the warp that brings it, for the next block.
  void bring(const typename Ring::Cursor& at, const Variant& variant, const TilePoint& where,
             const ptx::TensorMap& map) const {
    ring().wait_empty(at);
    if (Tile::copied > 0 && tile::lane() == 0) ring().expect(at, Tile::copied);
    variant.template put<Config::block_m, Config::block_n>(tile(at.stage()), where, map, ring().full(at.stage()));
    ring().fill_warp(at);
  }

  // Scores ← what terms make of them, as `apply` says, by what was brought for their block. The warp's first row in the
  // tile is `row`.
  template <class Scores, class Place>
  void apply(const Variant& variant, Scores& scores, const Place& place, const typename Ring::Cursor& at,
             int row) const {
    ring().wait_full(at);
    const LoadedStaged<Variant, Config::block_m, Config::block_n> loaded{{tile(at.stage()), row}};
    attention::apply(variant, scores, place, loaded);
    // An arrival waits for no load before it. A tensor copy, unlike a store, could overwrite what loads still wait for.
    if constexpr (Tile::copied > 0) ptx::fence_proxy_async_shared();
    ring().release_warp(at);
  }
};

// Called by one warp, which goes through the tiles as the thread does that loads keys.
template <class Loop>
inline void stage_terms(const Loop& loop, const typename Loop::Argument& argument) {
  using Config = typename Loop::Configuration;
  const Params& params = params_of(argument);
  const StagedTerms<Config> staged = loop.staged();
  typename Loop::Tiles::Cursor at_tiles;
  for (typename StagedTerms<Config>::Ring::Cursor at;; at_tiles.advance()) {
    loop.tiles().wait_full(at_tiles);
    const auto& entry = loop.entries[at_tiles.stage()];
    if (entry.end) break;
    const auto& work = entry.work;
    const typename Config::variant variant(params, work.tile.batch, work.tile.head);
    const int query = work.tile.m_block * Config::block_m;
#pragma unroll 1
    for (int position = work.blocks.end - 1; position >= work.blocks.begin; --position) {
      const int key = work.blocks.block(position) * Config::block_n;
      staged.bring(at, variant, {query, key, work.seqlen.diagonal()}, argument.scores);
      at.advance();
    }
  }
}

}  // namespace attention
