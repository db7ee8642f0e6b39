// attention: finds the work of the thread blocks of the one-pass backward for sm_90. The warp that does so finishes
// tiles of dq in between.
#pragma once

#include "attention/backward_params.cuh"
#include "attention/backward_sums_sm90.cuh"
#include "attention/backward_work.cuh"
#include "core/types.cuh"
#include "ptx/wgmma.cuh"
#include "tile/pipeline.cuh"

namespace attention {

// Called by a whole warp. Units are taken in order, so that nobody waits for a unit that is not being worked on, and
// not before the last loads of the unit before are on their way, since another block may come to a unit sooner. Until
// then the warp finishes tiles, if there are any.
template <class Config, class Main>
inline void find_work(const Main& main, const BackwardParams& backward, typename Main::Works& works,
                      typename EarlyFinish<Config, Main>::State& finishing) {
  EarlyFinish<Config, Main> early{backward, finishing};
  typename Main::Ring::Cursor at;
  bool done = false;
  if (Config::chains && tile::lane() == 0) works[at.previous().stage()].last_chain = true;
  do {
    if constexpr (finishes_early<Config>) {
      while (!__any_sync(0xffffffffu, main.claims().is_empty({at.count})) && early.find()) {
        early.write_piece();
        ptx::hold(at.count);  // what follows from the count is computed anew, not held
      }
      ptx::hold(at.count);
    }
    if (tile::lane() == 0) {
      main.claims().wait_empty({at.count});
      main.works().wait_empty(at);
      BackwardWork<Config>& work = works[at.stage()];
      const BackwardWork<Config>& previous = works[at.previous().stage()];
      const int chain = !Config::chains || previous.last_chain ? 0 : previous.chain + 1;
      const int unit = chain == 0 ? atomicAdd(backward.next_unit, 1) : previous.unit;
      done = unit >= BackwardWork<Config>::units(backward);
      if (!done) {
        work = BackwardWork<Config>::find(backward, unit);
        if constexpr (Config::chains) {
          work.unit = unit;
          work.chain = chain;
          __threadfence_block();  // the compiler forgets what `work` holds: registers are few
          work.take_chain();
        }
      } else {
        work.n_block = -1;
      }
      main.works().fill(at);
    }
    done = __shfl_sync(0xffffffffu, int(done), 0);
    at.advance();
  } while (!done);
}

// The same for packed sequences, called by a whole warp, which looks for them.
template <class Config, class Main>
inline void find_packed_work(const Main& main, const BackwardParams& backward, typename Main::Works& works) {
  typename Main::Ring::Cursor at;
  bool done = false;
  if (Config::chains && tile::lane() == 0) works[at.previous().stage()].last_chain = true;
  __syncwarp();
  do {
    main.claims().wait_empty({at.count});
    main.works().wait_empty(at);
    // All lanes have read what this entry was, if that was left out. Its unit and chain are written early: registers
    // are few.
    __syncwarp();
    BackwardWork<Config>& work = works[at.stage()];
    if (tile::lane() == 0) {
      const BackwardWork<Config>& previous = works[at.previous().stage()];
      work.chain = !Config::chains || previous.last_chain ? 0 : previous.chain + 1;
      work.unit = work.chain == 0 ? atomicAdd(backward.next_unit, 1) : previous.unit;
    }
    __syncwarp();
    done = work.unit >= BackwardWork<Config>::units(backward);
    if (!done) {
      const PackedUnit found = BackwardWork<Config>::template find_packed<Main::shares_sections>(backward, work.unit);
      if (found.units == 0) continue;
      const PackedOffset* const keys = backward.offsets_k + found.batch;
      if (found.place * Config::block_n >= keys[1].row - keys[0].row) continue;
      if (tile::lane() == 0) work.take_packed(backward, found);
      __syncwarp();
    }
    if (tile::lane() == 0) {
      if (done) work.n_block = -1;
      if (Config::chains && !done) work.take_chain();
      main.works().fill(at);
    }
    at.advance();
  } while (!done);
}

}  // namespace attention
