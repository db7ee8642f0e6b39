// attention: the units of work that persistent thread blocks of the backward for sm_90 take one after the other.
#pragma once

#include "attention/backward_params.cuh"
#include "core/types.cuh"
#include "ptx/wgmma.cuh"
#include "tile/accumulator.cuh"
#include "tile/pipeline.cuh"

namespace attention {

// Called by each warp that does the work of a thread block: calls step(entry) for every unit, in the order in which the
// warp that finds them fills the entries, and gives these back.
template <class Ring, class Entry, class Step>
inline void for_each_unit(const Ring& ring, const Entry (&entries)[Ring::stages], Step&& step) {
#pragma unroll 1
  for (typename Ring::Cursor at;; at.advance()) {
    ring.wait_full(at);
    const Entry& entry = entries[at.stage()];
    if (entry.none()) break;
    step(entry);
    ptx::hold(at.count);  // what follows from the count is computed anew, not held
    ring.release_warp(at);
  }
}

// The units of a thread block of one of two passes, two at a time: on their way from the warp that finds them to those
// that do them. `Work` says what a unit is, and how many there are.
template <class Work, UnitCount count>
struct BackwardUnits {
  static constexpr int stages = 2;
  using Ring = tile::Ring<stages>;
  using Claims = tile::Ring<1>;

  struct Entry {
    Work work;
    bool done;  // there is no more work

    bool none() const { return done; }
  };
  using Entries = Entry[stages];

  // What it takes in a struct of shared memory.
  struct Storage {
    typename Ring::Storage ring;
    typename Claims::Storage claims;
  };

  u32 barriers;

  Ring ring() const { return {barriers}; }
  Claims claims() const { return {barriers + Ring::bytes}; }

  // `warps` warps do the work.
  void init(int warps) const {
    ring().init(warps * tile::warp_arrivals);
    claims().init(1);
  }

  // Called by one warp. Units are taken in order, and not before the last loads of the unit before are on their way,
  // since another block may come to a unit sooner.
  void find(const BackwardParams& backward, Entries& entries) const {
    typename Ring::Cursor at;
    bool done = false;
    do {
      claims().wait_empty({at.count});
      ring().wait_empty(at);
      // All lanes have read what this entry was, if that was left out.
      __syncwarp();
      int unit = 0;
      if (tile::lane() == 0) unit = atomicAdd(backward.next_unit + count, 1);
      unit = __shfl_sync(0xffffffffu, unit, 0);
      Entry& entry = entries[at.stage()];
      done = unit >= Work::units(backward);
      if (!done) {
        Work::find_into(entry.work, backward, unit);
        __syncwarp();
        if (entry.work.idle()) continue;
      }
      if (tile::lane() == 0) {
        entry.done = done;
        ring().fill(at);
      }
      at.advance();
    } while (!done);
  }

  // Called by each warp that does the work: calls step(work) for every unit.
  template <class Step>
  void for_each(const Entries& entries, Step&& step) const {
    for_each_unit(ring(), entries, [&](const Entry& entry) { step(entry.work); });
  }

  // Called by one thread, when the last loads of a unit are on their way.
  void claim_next() const { claims().release({}); }
};

}  // namespace attention
