// attention: what score terms read for a tile of the gradients, staged beside its queries or loaded ahead by consumers.
#pragma once

#include "attention/loaded.cuh"
#include "attention/place.cuh"
#include "attention/variant.cuh"
#include "core/math.cuh"
#include "core/types.cuh"

namespace attention {

template <class Config>
struct TileTerms {
  using Variant = typename Config::variant;
  using Stages = typename Choice<Config::stages_terms, Variant, attention::Variant<>>::Type;
  using Tile = typename Stages::template Staged<Config::block_m, Config::block_n>;
  static constexpr bool crowd = Config::stages_terms && Config::tile_head_dim > 64;  // so much that a tile of dq goes

  // The swizzle begins anew there.
  static constexpr int alignment = 1024;

  // Where the tiles of so many stages begin and end in shared memory, behind what takes `bytes`.
  static constexpr int begin(int bytes) { return round_up(bytes, alignment); }
  static constexpr int end(int bytes, int stages) {
    return Config::stages_terms ? begin(bytes) + stages * Tile::bytes : bytes;
  }

  using Ahead = typename Choice<Config::stages_terms, LoadedTurned<Stages, Config::block_m, Config::block_n>,
                                LoadedAhead<Variant, TransposedPlace<Config>, 1, Config::block_m>>::Type;

  // Called by the consumers, before the products: loads what a warp's 16 keys need, of a tile at shared address `tile`
  // or of where the tile is.
  template <class Where>
  static void load(Ahead& ahead, u32 tile, Where&& where) {
    if constexpr (Config::stages_terms) {
      ahead.tile.load(tile, (int(threadIdx.x / 32) - 4) * 16);
    } else if constexpr (Variant::loads) {
      const auto place = where();
      ahead.load(Variant(place.params, place.batch, place.head), place);
    }
  }
};

}  // namespace attention
