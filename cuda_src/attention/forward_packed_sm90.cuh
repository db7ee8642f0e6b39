// attention: the forward kernel for sm_90 where packed sequences have many tiles. The host knows no length, and so not
// what tiles cost; thread blocks take them as they come.
#pragma once

#include "attention/forward_sm90.cuh"
#include "attention/packed.cuh"
#include "attention/params.cuh"
#include "attention/taken_tiles.cuh"
#include "attention/taken_tma_params.cuh"
#include "attention/work.cuh"

namespace attention {

// The work of a tile, whose sequence is looked for among 32 offsets at a time: what finds tiles has few registers.
template <class Config>
struct PackedWork : Work<Config> {
  void find(const Params& params, PackedScan& scan, int unit, bool second) {
    Work<Config>::template find<1, false>(params, scan, unit, second);
  }
};

// What the main loop is given: see GivenTiles.
template <class Config>
struct PackedTiles {
  using Argument = TakenTmaParams;
  using Work = PackedWork<Config>;
  using Cursor = TakingCursor<Argument>;
  using CursorAgain = TrailCursor<Argument>;
  static constexpr int load_lanes = 1;
  static constexpr bool finds_empty = true, finds_late = true;
};

template <class Config>
inline void forward_packed_sm90(const TakenTmaParams& argument) {
  forward_tiles<Config, PackedTiles<Config>>(argument);
}

}  // namespace attention
