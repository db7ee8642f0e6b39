// attention: the argument of kernels that load through tensor maps: the maps, Params, and who does what.
#pragma once

#include "attention/params.cuh"
#include "core/types.cuh"
#include "ptx/tma.cuh"

namespace attention {

// How the units of a launch (attention/scheduler.cuh) are dealt to its blocks. The first go round and round. Tiles of
// the others are listed, block by block, in an order that makes the blocks end together.
struct Deal {
  static constexpr int max_blocks = 160, max_tiles = 4 * max_blocks;

  i32 round_units;
  u16 begin[max_blocks + 1];  // of each block's in `tiles`
  u16 tiles[max_tiles];       // 2 · (unit - round_units), + 1 for the second tile of a pair
};

// The map of q is (columns, rows, heads, batch), or, where heads share tiles, (columns, heads that do, rows, key heads,
// batch); those of k and v are (columns, rows, heads, batch), or, packed, (columns, clipped rows, heads, rows): see
// _keys in cufa/_tensor_map.py.
struct TmaParams {
  ptx::TensorMap q, k, v;
  Params params;
  Deal deal;
};

}  // namespace attention
