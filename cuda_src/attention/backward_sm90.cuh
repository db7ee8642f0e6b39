// attention: the backward's main kernel for sm_90: one thread block a block of keys.
#pragma once

#include "attention/backward_finish.cuh"
#include "attention/backward_mainloop_sm90.cuh"
#include "attention/backward_params.cuh"
#include "attention/backward_prepare.cuh"
#include "attention/backward_work.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/shared.cuh"

namespace attention {

template <class Config>
inline void backward_prepare(const BackwardArgument& argument) {
  prepare<Config>(argument.params);
}

template <class Config>
inline void backward_finish(const BackwardArgument& argument) {
  finish<Config, BackwardMainloopSm90<Config>>(argument.params);
}

template <class Config>
inline void backward_sm90(const BackwardArgument& argument) {
  using Mainloop = BackwardMainloopSm90<Config>;
  static_assert(Config::smem_bytes == Mainloop::smem_bytes,
                "cufa/_configs_backward.py and the tiles disagree on shared memory");
  static_assert(Config::num_threads == 128 * (1 + Mainloop::consumers), "a warpgroup loads, the others compute");
  extern __shared__ __align__(1024) char dynamic_smem[];
  __shared__ BackwardWork work;
  const Mainloop mainloop{ptx::shared_address(dynamic_smem)};

  if (threadIdx.x == 0) {
    mainloop.init();
    work = BackwardWork::find<Config>(argument.params, blockIdx.x);
  }
  __syncthreads();
  if (work.template idle<Config>()) return;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp < 4) {
    ptx::setmaxnreg_dec<Config::producer_registers>();
    if (threadIdx.x == 0) load_tiles<Config>(mainloop, argument, work);
    if (warp == 1) mainloop.add_dq(argument.params, work);
  } else {
    ptx::setmaxnreg_inc<Config::consumer_registers>();
    mainloop.consume(argument.params, work, warp / 4 - 1);
  }
}

}  // namespace attention
