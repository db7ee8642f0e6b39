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
  finish<Config>(argument.params);
}

// The pass over blocks of keys, for dk and dv.
template <class Config>
inline void backward_split_keys_sm90(const BackwardArgument& argument) {
  using Mainloop = BackwardKeysSm90<Config>;
  static_assert(Config::smem_bytes == max_of(Mainloop::smem_bytes, BackwardQueriesSm90<Config>::smem_bytes),
                "Config and the tiles disagree on shared memory");
  extern __shared__ __align__(1024) char dynamic_smem[];
  __shared__ BackwardWork<Config> work;
  const Mainloop mainloop{ptx::shared_address(dynamic_smem)};

  if (threadIdx.x == 0) mainloop.init();
  if (threadIdx.x < (Config::varlen ? 32 : 1)) {
    const BackwardWork<Config> found = BackwardWork<Config>::find(argument.params, blockIdx.x);
    if (threadIdx.x == 0) work = found;
  }
  __syncthreads();
  if (work.idle()) return;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<Config::producer_registers>();
    if (threadIdx.x == 0) TileLoader<Config, Mainloop, Side::scores>{mainloop, argument}.load(work);
    if (threadIdx.x == 32) TileLoader<Config, Mainloop, Side::gradients>{mainloop, argument}.load(work);
  } else {
    ptx::setmaxnreg_inc<Config::consumer_registers>();
    if (warpgroup == 1)
      mainloop.consume_scores(argument.params, work);
    else
      mainloop.consume_gradients(argument.params, work);
  }
}

// The pass over tiles of queries, for dq.
template <class Config>
inline void backward_split_queries_sm90(const BackwardArgument& argument) {
  using Mainloop = BackwardQueriesSm90<Config>;
  extern __shared__ __align__(1024) char dynamic_smem[];
  __shared__ typename Mainloop::Work work;
  const Mainloop mainloop{ptx::shared_address(dynamic_smem)};

  if (threadIdx.x == 0) mainloop.init();
  if (threadIdx.x < (Config::varlen ? 32 : 1)) {
    const typename Mainloop::Work found = Mainloop::Work::find(argument.params, blockIdx.x);
    if (threadIdx.x == 0) work = found;
  }
  __syncthreads();
  if (work.idle()) return;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<Config::producer_registers>();
    if (threadIdx.x == 0) mainloop.load(argument, work);
  } else {
    ptx::setmaxnreg_inc<Config::consumer_registers>();
    mainloop.consume(argument.params, work, warpgroup - 1);
  }
}

}  // namespace attention
