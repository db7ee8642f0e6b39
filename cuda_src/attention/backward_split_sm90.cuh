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

// The pass over blocks of keys, for dk and dv.
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

  // This grid begins when all thread blocks of the pass over keys have, and those began when what both passes read had
  // been written. It needs nothing of that pass, so its blocks take the place of those that end; but it must not end
  // before that has. Its last block sees to that, and to the next grid's beginning when all blocks have begun.
  if (argument.params.n_blocks == 0) ptx::grid_wait();  // there is no pass over keys
  ptx::grid_launch_dependents();
  if (threadIdx.x == 0) {
    __threadfence();  // the SM may hold what an earlier call has left where the kernels before have written
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
