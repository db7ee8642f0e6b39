// tile: turns of warpgroups, one after the other and then the first again.
#pragma once

#include "core/types.cuh"
#include "ptx/barrier.cuh"

namespace tile {

// Named barriers of a block. Barrier 0 is that of __syncthreads; each warpgroup that takes turns has one.
enum Barrier : u32 { block_barrier, first_turn };

// One warpgroup's place among those that take turns, of which number `first` has its turn when all are made.
template <int warpgroups, int first = 0>
struct Turn {
  static constexpr u32 threads = 2 * 128;                       // of who waits, and of who gives it the turn
  static constexpr u32 next_barrier = first_turn + warpgroups;  // which no turn uses

  int warpgroup;

  explicit Turn(int warpgroup) : warpgroup(warpgroup) {
    if (warpgroup == first) ptx::bar_arrive(first_turn + first, threads);
  }

  void take() const { ptx::bar_sync(first_turn + warpgroup, threads); }

  // To whom is said where it is called: how that is computed decides on registers there.
  void pass(int to) const { ptx::bar_arrive(first_turn + to, threads); }
};

}  // namespace tile
