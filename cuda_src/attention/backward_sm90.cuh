// attention: the backward's main kernel for sm_90: thread blocks that take one block of keys after the other.
#pragma once

#include "attention/backward_find_sm90.cuh"
#include "attention/backward_finish.cuh"
#include "attention/backward_mainloop_sm90.cuh"
#include "attention/backward_offsets.cuh"
#include "attention/backward_params.cuh"
#include "attention/backward_prepare.cuh"
#include "attention/backward_repair.cuh"
#include "attention/backward_sums_sm90.cuh"
#include "attention/backward_work.cuh"
#include "ptx/grid.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/shared.cuh"

namespace attention {

template <class Config>
inline void backward_prepare(const BackwardArgument& argument) {
  prepare<Config, BackwardMainloopSm90<Config>>(argument.params);
}

template <class Config>
inline void backward_finish(const BackwardArgument& argument) {
  using Main = BackwardMainloopSm90<Config>;
  if constexpr (Config::finishes)
    finish<Config>(argument.params);
  else
    finish<Config, Main>(argument.params);
}

template <class Config>
inline void backward_sm90(const BackwardArgument& argument) {
  using Mainloop = BackwardMainloopSm90<Config>;
  static_assert(Config::smem_bytes == Mainloop::smem_bytes, "Config and the tiles disagree on shared memory");
  static_assert(Config::num_threads == 128 * (1 + Mainloop::consumers), "a warpgroup loads, the others compute");
  extern __shared__ __align__(1024) char dynamic_smem[];
  __shared__ typename Mainloop::Works works;
  __shared__ typename EarlyFinish<Config, Mainloop>::State finishing;
  const Mainloop mainloop{ptx::shared_address(dynamic_smem)};

  // Who finds the work waits for the kernels before. The others wait for work, so what these have written is there.
  ptx::grid_launch_dependents();
  if (threadIdx.x == 0) {
    mainloop.init();
    EarlyFinish<Config, Mainloop>::init(finishing);
  }
  __syncthreads();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp < 4) {
    ptx::setmaxnreg_dec<Config::producer_registers>();
    if (warp == 0) mainloop.template load<Side::scores>(argument, works);
    if (warp == 1) mainloop.template load<Side::gradients>(argument, works);
    if (warp == 2) mainloop.add_dq(argument.params, works);
    if (warp == 3) ptx::grid_wait();
    if constexpr (Config::varlen) {
      if (warp == 3) find_packed_work<Config>(mainloop, argument.params, works);
    } else {
      if (warp == 3) find_work<Config>(mainloop, argument.params, works, finishing);
    }
  } else {
    ptx::setmaxnreg_inc<Config::consumer_registers>();
    mainloop.consume(argument.params, works, warp / 4 - 1);
    if constexpr (Config::finishes) finish_heads<Config, Mainloop>(argument.params, finishing.done, threadIdx.x - 128);
  }
}

}  // namespace attention
