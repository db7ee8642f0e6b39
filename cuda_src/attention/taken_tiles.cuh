// attention: takes thread blocks through units of which the host does not know what they cost: each time the next that
// no block has taken. `Argument` has
//   i32* dealt;  // how many units have been taken; for each thread block the first that it took; and for each unit the
//                // one that its block took next
//   i32 units;   // how many there are: see attention/scheduler.cuh
#pragma once

#include "core/types.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// A whole warp has the cursor. It leaves a trail in `dealt`, whose first number an earlier launch has set to 0.
template <class Argument>
struct TakingCursor {
  const Argument& argument;
  int place;  // where the trail goes on
  int at;     // the unit

  explicit TakingCursor(const Argument& argument) : argument(argument), place(1 + blockIdx.x) { advance(); }

  int unit() const { return at; }
  bool second() const { return false; }
  bool done() const { return at >= argument.units; }
  void advance() {
    int taken = 0;
    if (tile::lane() == 0) {
      taken = atomicAdd(argument.dealt, 1);
      argument.dealt[place] = taken;
    }
    at = __shfl_sync(0xffffffffu, taken, 0);
    place = 1 + gridDim.x + at;
  }
};

// Takes a thread block once more through the units that it has taken.
template <class Argument>
struct TrailCursor {
  const Argument& argument;
  int at;

  explicit TrailCursor(const Argument& argument) : argument(argument), at(argument.dealt[1 + blockIdx.x]) {}

  int unit() const { return at; }
  bool second() const { return false; }
  bool done() const { return at >= argument.units; }
  void advance() { at = argument.dealt[1 + gridDim.x + at]; }
};

}  // namespace attention
