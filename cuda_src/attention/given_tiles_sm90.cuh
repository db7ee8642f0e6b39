// attention: the tiles that the main loop for sm_90 computes of arrays that are as long as the host says, or packed.
#pragma once

#include "attention/scheduler.cuh"
#include "attention/tma_params.cuh"
#include "attention/work.cuh"

namespace attention {

// A main loop is told by such a struct what it is given, what its tiles are, what finds them, and what finds them again
// for repairs; how many lanes of a warp load keys together; whether tiles that see no key are among those that it
// finds; and whether a tile is to be looked for no sooner than the one before is about to end, as where blocks take
// what is left.
template <class Config>
struct GivenTiles {
  using Argument = TmaParams;
  using Work = attention::Work<Config>;
  using Cursor = TileCursor<Config>;
  using CursorAgain = Cursor;
  static constexpr int load_lanes = 1;
  static constexpr bool finds_empty = Config::varlen, finds_late = false;
};

}  // namespace attention
