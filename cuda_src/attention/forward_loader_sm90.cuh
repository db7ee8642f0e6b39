// attention: how the forward's main loop with wgmma, for sm_90, has its tiles of q, k and v loaded.
#pragma once

#include "attention/params.cuh"
#include "attention/row_source.cuh"
#include "ptx/tma.cuh"
#include "tile/accumulator.cuh"
#include "tile/tensor_sm90.cuh"

namespace attention {

// Used by the lanes that load together, as many as the main loop's Source says.
template <class Loop>
struct ForwardLoader {
  using Config = typename Loop::Configuration;
  using Source = typename Loop::TileSource;
  using Work = typename Loop::Work;
  using Queries = typename Loop::Queries;
  using Keys = typename Loop::Keys;

  const Loop& loop;
  const typename Loop::Argument& argument;
  typename Queries::Cursor at_queries;
  typename Keys::Cursor at_keys, at_values;

  void load_keys(const Work& work, int n_block) {
    load_block(loop.keys(), at_keys, loop.k(at_keys.stage()), argument.k, work, n_block);
  }

  void load_values(const Work& work, int n_block) {
    load_block(loop.values(), at_values, loop.v(at_values.stage()), argument.v, work, n_block);
  }

  // Whether this lane does what one has to do for all that load.
  static bool speaks() { return Source::load_lanes == 1 || tile::lane() == 0; }

  void load_queries(const Work& work) {
#pragma unroll 1
    for (int w = 0; w < Loop::consumers && speaks(); ++w) {
      const Queries queries = loop.queries(w);
      queries.wait_empty(at_queries);
      queries.expect(at_queries, Loop::Q::bytes);
      const int row = work.seqlen.q_first_row + (work.tile.m_block * Config::block_m + 64 * w) / Config::pack;
      const int batch = Config::varlen ? 0 : work.tile.batch;
      const u32 stage = at_queries.stage();
      if constexpr (Config::pack == 1) {
        tile::load(loop.q(w, stage), argument.q, queries.full(stage), row, work.tile.head, batch);
      } else {
        tile::load_heads(loop.q(w, stage), argument.q, queries.full(stage), row, work.tile.head, batch);
      }
    }
    at_queries.advance();
  }

 private:
  template <class Tile>
  void load_block(const Keys& ring, typename Keys::Cursor& at, const Tile& to, const ptx::TensorMap& map,
                  const Work& work, int n_block) const {
    if constexpr (Source::load_lanes == 1) {
      ring.wait_empty(at);
      ring.expect(at, Tile::bytes);
      load_rows<Config>(to, map, ring.full(at.stage()), n_block * Config::block_n, work.keys(params_of(argument)));
    } else {
      // This looks at memory, which takes a while, and so comes before the wait.
      const auto box = work.keys(params_of(argument)).template find<Tile>(n_block * Config::block_n);
      ring.wait_empty(at);
      if (speaks()) ring.expect(at, Tile::bytes);
      __syncwarp();
      box.load(to, map, ring.full(at.stage()));
    }
    at.advance();
  }
};

}  // namespace attention
