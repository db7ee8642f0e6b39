// attention: what main loops know of the block at a position: which it is, and whether and how it is masked. Blocks
// that follow each other are arithmetic, asked for where they are needed. A list is in memory, so what it says is asked
// for before products begin, and has come when they are done.
#pragma once

#include "attention/blocks.cuh"
#include "attention/params.cuh"
#include "attention/scoring.cuh"
#include "core/types.cuh"
#include "ptx/shared.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// Of blocks of keys, for a warp's rows of queries. Config is that of a forward.
template <class Config, bool listed = !Config::mask::Blocks::contiguous>
struct KeysAhead {
  using Blocks = typename Config::mask::Blocks;

  void ask(const Params&, const Blocks&, int) {}
  void ask_bounds(const Params&, int) {}

  static constexpr int block(const Blocks& blocks, int position) { return blocks.block(position); }

  static constexpr bool is_boundary(const Blocks& blocks, int position) {
    return blocks.template is_boundary<Config::mask::hides_first>(position);
  }

  template <class Variant, class Scores, class Place>
  void mask(const Variant& variant, Scores& scores, const Place& place) const {
    attention::mask(variant, scores, place);
  }
};

template <class Config>
struct KeysAhead<Config, true> {
  using Mask = typename Config::mask;
  using Blocks = typename Mask::Blocks;

  int its_block = 0, tile = -1;
  bool boundary = false;
  Bounds bounds[2];

  void ask(const Params& params, const Blocks& blocks, int position) {
    its_block = blocks.block(position);
    boundary = blocks.template is_boundary<Mask::hides_first>(position);
    if constexpr (Blocks::bounded) tile = Mask::template tile_of<Config>(params, blocks, position);
  }

  // Asks for what two rows of queries see, of which the first is row `first_row` of the head.
  void ask_bounds(const Params& params, int first_row) {
    if constexpr (Blocks::bounded) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        bounds[i] = Mask::template bounds_of_query<Config>(params, tile, (first_row + 8 * i) / Config::pack);
      }
    }
  }

  int block(const Blocks&, int) const { return its_block; }
  bool is_boundary(const Blocks&, int) const { return boundary; }

  template <class Variant, class Scores, class Place>
  void mask(const Variant& variant, Scores& scores, const Place& place) const {
    static_assert(!Variant::hides_in_full, "no other term hides keys, of which bounds say nothing");
    if constexpr (Blocks::bounded)
      mask_within(scores, place, bounds, Mask::within_columns(place.key()));
    else
      attention::mask(variant, scores, place);
  }
};

// Of tiles of queries, for a warp's rows of keys. Config is that of a backward. What a list says of a tile the warp
// that loads the tile tells consumers, in shared memory beside it: were these to ask memory themselves, one access that
// waits for another would come before the products of every tile.
template <class Config, bool listed = !Config::mask::Tiles::contiguous>
struct QueriesAhead {
  using Tiles = typename Config::mask::Tiles;
  static constexpr int told_bytes = 0;

  static uint2 to_tell(const Params&, const Tiles&, int) { return {}; }
  void ask(const Tiles&, int) {}
  void hear(u32) {}
  void ask_bounds(const Params&, int) {}

  static constexpr int block(const Tiles& tiles, int position) { return tiles.block(position); }
  static constexpr bool is_boundary(const Tiles& tiles, int position) { return tiles.is_boundary(position); }

  template <class Scores, class Place>
  void mask(Scores&, const Place&) const {}
};

template <class Config>
struct QueriesAhead<Config, true> {
  using Mask = typename Config::mask;
  using Tiles = typename Mask::Tiles;
  static constexpr int told_bytes = 2 * sizeof(u32);  // for a tile

  int its_block, tile;
  bool boundary;
  Bounds bounds[2];

  // What the thread that loads the tile is to tell.
  static uint2 to_tell(const Params& params, const Tiles& tiles, int position) {
    int tile = -1;
    if constexpr (Tiles::bounded) tile = Mask::template tile_seeing<Config>(params, tiles, position);
    return {u32(2 * tiles.block(position) + tiles.is_boundary(position)), u32(tile)};
  }

  // Where dropout draws before the tile has come, for which it has to know which one it is.
  void ask(const Tiles& tiles, int position) {
    if constexpr (Config::variant::drops) its_block = tiles.block(position);
  }

  void hear(u32 from) {
    const uint2 told = ptx::ld_shared_v2(from);
    its_block = int(told.x / 2);
    boundary = told.x % 2 != 0;
    tile = int(told.y);
  }

  // `first_key` is the first of two keys, 8 apart, that are seen within bounds.
  void ask_bounds(const Params& params, int first_key) {
    if constexpr (Tiles::bounded) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        bounds[i] = Mask::template bounds_of_key<Config>(params, tile, first_key + 8 * i);
      }
    }
  }

  int block(const Tiles&, int) const { return its_block; }
  bool is_boundary(const Tiles&, int) const { return boundary; }

  template <class Scores, class Place>
  void mask(Scores& scores, const Place& place) const {
    if constexpr (Tiles::bounded) mask_within(scores, place, bounds, Mask::within_rows(place.query()));
  }
};

}  // namespace attention
