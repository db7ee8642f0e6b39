// attention: the backward's kernels with mma.sync and cp.async, for sm_80 and every newer GPU: one thread block per
// block of keys.
#pragma once

#include "attention/backward_finish.cuh"
#include "attention/backward_mainloop_sm80.cuh"
#include "attention/backward_offsets.cuh"
#include "attention/backward_params.cuh"
#include "attention/backward_prepare.cuh"
#include "attention/backward_repair.cuh"
#include "attention/backward_work.cuh"
#include "ptx/shared.cuh"

namespace attention {

template <class Config>
inline void backward_prepare(const BackwardArgument& argument) {
  prepare<Config, BackwardMainloopSm80<Config>>(argument.params);
}

template <class Config>
inline void backward_finish(const BackwardArgument& argument) {
  finish<Config, BackwardMainloopSm80<Config>>(argument.params);
}

template <class Config>
inline void backward_sm80(const BackwardArgument& argument) {
  using Main = BackwardMainloopSm80<Config>;
  static_assert(Config::smem_bytes == Main::smem_bytes, "Config and the tiles disagree on shared memory");
  extern __shared__ __align__(1024) char dynamic_smem[];
  __shared__ typename Main::State state;
  const BackwardParams& backward = argument.params;
  const BackwardWork<Config>& work = state.work;

  if (threadIdx.x < (Config::varlen ? 32 : 1)) {
    const BackwardWork<Config> found = BackwardWork<Config>::find(backward, blockIdx.x);
    if (threadIdx.x == 0) {
      state.work = found;
      state.tiles[0] = {found.head * backward.forward.qheads_per_khead, found.tiles.begin};
    }
  }
  __syncthreads();
  if (work.idle()) return;

  const Main main{backward, state, work, ptx::shared_address(dynamic_smem)};
  typename Main::Sums sums;
  if (work.tiles.empty()) {
    sums.zero();
  } else {
    main.run(sums);
    __syncthreads();  // every warp is done with the tiles of K and V
  }
  main.write(sums);
}

}  // namespace attention
