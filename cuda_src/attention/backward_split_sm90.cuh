// attention: the backward for sm_90 where head_dims are too wide for one pass: a pass for dk and dv, and one for dq.
// Scores are computed twice, and nothing is added up in memory, so that gradients are the same bits in every run.
#pragma once

#include "attention/backward_finish.cuh"
#include "attention/backward_offsets.cuh"
#include "attention/backward_params.cuh"
#include "attention/backward_prepare.cuh"
#include "attention/backward_repair.cuh"
#include "attention/backward_split_keys_sm90.cuh"
#include "attention/backward_split_queries_sm90.cuh"
#include "attention/backward_units_sm90.cuh"
#include "attention/backward_work.cuh"
#include "ptx/grid.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/shared.cuh"
#include "tile/accumulator.cuh"

namespace attention {

template <class Config>
inline void backward_prepare(const BackwardArgument& argument) {
  prepare<Config>(argument.params);
}

template <class Config>
inline void backward_finish(const BackwardArgument& argument) {
  finish<Config>(argument.params);
}

// The pass over blocks of keys, for dk and dv. All of its thread blocks begin with ptx::grid_begin: they wait for the
// kernels before, and only then let the pass over queries begin, which counts on that.
template <class Config>
inline void backward_split_keys_sm90(const BackwardArgument& argument) {
  using Mainloop = BackwardKeysSm90<Config>;
  static_assert(Config::smem_bytes == max_of(Mainloop::smem_bytes, BackwardQueriesSm90<Config>::smem_bytes),
                "Config and the tiles disagree on shared memory");
  extern __shared__ __align__(1024) char dynamic_smem[];
  __shared__ typename Mainloop::Units::Entries entries;
  const Mainloop mainloop{ptx::shared_address(dynamic_smem)};
  const typename Mainloop::Units units = mainloop.units();

  if (threadIdx.x == 0) mainloop.init();
  __syncthreads();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp < 4) {
    ptx::setmaxnreg_dec<Config::producer_registers>();
    const auto load = [&](auto loader, bool claims) {
      units.for_each(entries, [&](const BackwardWork<Config>& work) {
        if (tile::lane() != 0) return;
        loader.load(work);
        if (claims) units.claim_next();
      });
    };
    if (warp == 0) load(TileLoader<Config, Mainloop, Side::scores>{mainloop, argument}, true);
    if (warp == 1) load(TileLoader<Config, Mainloop, Side::gradients>{mainloop, argument}, false);
    if (warp == 3) units.find(argument.params, entries);
  } else {
    ptx::setmaxnreg_inc<Config::consumer_registers>();
    typename Mainloop::Progress progress;
    if (warp < 8) {
      units.for_each(
          entries, [&](const BackwardWork<Config>& work) { mainloop.consume_scores(argument.params, work, progress); });
    } else {
      units.for_each(entries, [&](const BackwardWork<Config>& work) {
        mainloop.consume_gradients(argument.params, work, progress);
      });
    }
  }
}

// The pass over tiles of queries, for dq.
template <class Config>
inline void backward_split_queries_sm90(const BackwardArgument& argument) {
  using Mainloop = BackwardQueriesSm90<Config>;
  extern __shared__ __align__(1024) char dynamic_smem[];
  __shared__ typename Mainloop::Units::Entries entries;
  const Mainloop mainloop{ptx::shared_address(dynamic_smem)};
  const typename Mainloop::Units units = mainloop.units();

  // This grid begins when every thread block of the pass over keys has let it, and each had waited for the kernels
  // before to end. So what both passes read has been written, and as nothing is needed of the pass over keys, nobody
  // waits for it: blocks take the place of those of that pass that end. Without keys there is no such pass, and the
  // grid before is one that has to be waited for.
  if (argument.params.n_blocks == 0) ptx::grid_wait();
  ptx::grid_launch_dependents();
  if (threadIdx.x == 0) {
    // In place of a wait this makes the SM read what those kernels have written, and nothing older from its L1.
    __threadfence();
    mainloop.init();
  }
  __syncthreads();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp < 4) {
    ptx::setmaxnreg_dec<Config::producer_registers>();
    if (warp == 0) {
      typename Mainloop::Progress progress;
      units.for_each(entries, [&](const typename Mainloop::Work& work) {
        if (tile::lane() != 0) return;
        mainloop.load(argument, work, progress);
        units.claim_next();
      });
    }
    // What comes behind reads dk and dv but waits for this grid alone, which hence must not end before the pass over
    // keys has: one thread that has nothing else to do waits for that, and its block ends when it does.
    if (threadIdx.x == 2 * 32 && blockIdx.x == gridDim.x - 1) ptx::grid_wait();
    if (warp == 3) units.find(argument.params, entries);
  } else {
    ptx::setmaxnreg_inc<Config::consumer_registers>();
    const int consumer = warp / 4 - 1;
    const typename Mainloop::Turn turn(consumer);
    typename Mainloop::Progress progress;
    units.for_each(entries, [&](const typename Mainloop::Work& work) {
      mainloop.consume(argument.params, work, consumer, turn, progress);
    });
  }
}

}  // namespace attention
