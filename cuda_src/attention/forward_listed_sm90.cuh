// attention: the forward kernel for sm_90 where a list says which blocks of keys a tile of queries needs. So the host
// does not know what tiles cost, and thread blocks take them as they come.
#pragma once

#include "attention/forward_sm90.cuh"
#include "attention/taken_tiles.cuh"
#include "attention/taken_tma_params.cuh"
#include "attention/work.cuh"

namespace attention {

// What the main loop is given: see GivenTiles.
template <class Config>
struct ListedTiles {
  using Argument = TakenTmaParams;
  using Work = attention::Work<Config>;
  using Cursor = TakingCursor<Argument>;
  using CursorAgain = TrailCursor<Argument>;
  static constexpr int load_lanes = 1;
  static constexpr bool finds_empty = false, finds_late = true;
};

template <class Config>
inline void forward_listed_sm90(const TakenTmaParams& argument) {
  forward_tiles<Config, ListedTiles<Config>>(argument);
}

}  // namespace attention
