// attention: the argument of kernels that load through tensor maps: the maps, Params, and who does what.
#pragma once

#include "attention/params.cuh"
#include "core/types.cuh"
#include "ptx/tma.cuh"

namespace attention {

// How the units of a launch (attention/scheduler.cuh) are dealt to its thread blocks. The first round_units units go to
// the blocks in turn, round after round. The tiles of the other units are listed, block by block, so that the blocks
// end together.
struct Deal {
  static constexpr int max_blocks = 160, max_tiles = 4 * max_blocks;

  i32 round_units;
  u16 begin[max_blocks + 1];  // where the list of each block begins in `tiles`
  u16 tiles[max_tiles];       // 2 · (unit - round_units), + 1 for the second tile of a pair
};

// The map of q has the axes (columns, rows, heads, batch), or, where heads share tiles, (columns, heads that share one,
// rows, key heads, batch). The maps of k and v have the axes (columns, rows, heads, batch), or, for packed sequences,
// (columns, clipped rows, heads, rows): the two axes of rows add up, and rows of a box past the clipped rows become
// zeros, so that it can end with a sequence: see `load_rows` in attention/row_source.cuh. That of an array of scores
// has the axes (keys, queries, heads, batch), of which the last two are one where all share it.
struct TmaParams {
  ptx::TensorMap q, k, v;
  Params params;
  Deal deal;
  ptx::TensorMap scores;  // of the array of scores that a term stages by tensor copies, if one does
};

constexpr const Params& params_of(const TmaParams& argument) { return argument.params; }

}  // namespace attention
