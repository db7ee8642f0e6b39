// tile: stages of shared memory that a producer fills and consumers drain, handed over through mbarriers.
#pragma once

#include "core/types.cuh"
#include "ptx/mbarrier.cuh"

namespace tile {

// Which stage comes next, and the parity of the phase in which that stage is full. One count says both.
template <int stages>
struct Cursor {
  static_assert((stages & (stages - 1)) == 0, "remainders must be cheap");
  u32 count = 0;

  u32 stage() const { return count % stages; }
  u32 parity() const { return count / stages % 2; }
  void advance() { ++count; }
  Cursor before(u32 steps) const { return {count - steps}; }
  Cursor previous() const { return before(1); }
};

// Two cursors in one register: the first's count, and, in its highest bits, the second's: the parity of a ring of one
// stage, or what a ring of two stages needs.
template <int stages, int second_stages = 1>
struct CursorPair {
  static_assert(second_stages == 1 || second_stages == 2, "there are one or two bits");
  static constexpr int shift = 32 - second_stages;
  Cursor<stages> first;

  Cursor<second_stages> second() const { return {first.count >> shift}; }
  void advance_second() {
    if constexpr (second_stages == 1)
      first.count ^= 1u << shift;
    else
      first.count += 1u << shift;
  }
};

inline void wait(u32 barrier, u32 parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// Arrivals that a warp makes. One lane speaks for the whole warp, which racecheck of compute-sanitizer does not
// understand: for racecheck every lane speaks for itself.
#ifdef CUFA_RACECHECK
inline constexpr int warp_arrivals = 32;
#else
inline constexpr int warp_arrivals = 1;
#endif

// The barriers of `stages` stages at shared address `barriers`: those that say full, then those that say empty.
template <int stages_>
struct Ring {
  static constexpr int stages = stages_;
  static constexpr int bytes = 2 * stages * sizeof(u64);
  using Cursor = tile::Cursor<stages>;

  // What a ring takes in a struct of shared memory.
  struct Storage {
    u64 barriers[2 * stages];
  };

  u32 barriers;

  u32 full(u32 stage) const { return barriers + stage * sizeof(u64); }
  u32 empty(u32 stage) const { return barriers + (stages + stage) * sizeof(u64); }

  // `producers` threads fill a stage; `consumers` threads must say that they are done with it. A warp that speaks as
  // one counts as warp_arrivals threads.
  void init(int consumers, int producers = 1) const {
    for (int stage = 0; stage < stages; ++stage) {
      ptx::mbarrier_init(full(stage), producers);
      ptx::mbarrier_init(empty(stage), consumers);
    }
  }

  // The producers' side. A fresh barrier counts as one whose previous phase is complete: stages begin empty.
  void wait_empty(const Cursor& at) const { wait(empty(at.stage()), at.parity() ^ 1); }
  bool is_empty(const Cursor& at) const { return ptx::mbarrier_test_wait_parity(empty(at.stage()), at.parity() ^ 1); }
  void expect(const Cursor& at, int bytes) const { ptx::mbarrier_arrive_expect_tx(full(at.stage()), bytes); }

  void fill(const Cursor& at) const { ptx::mbarrier_arrive(full(at.stage())); }
  void fill_warp(const Cursor& at) const { arrive_warp(full(at.stage())); }

  // The consumers' side.
  void wait_full(const Cursor& at) const { wait(full(at.stage()), at.parity()); }
  void release(const Cursor& at) const { ptx::mbarrier_arrive(empty(at.stage())); }
  void release_warp(const Cursor& at) const { arrive_warp(empty(at.stage())); }

 private:
  static void arrive_warp(u32 barrier) {
    __syncwarp();
    if (warp_arrivals == 32 || threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
  }
};

}  // namespace tile
