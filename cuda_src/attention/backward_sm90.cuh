// attention: the backward's main kernel for sm_90: one thread block a block of keys.
#pragma once

#include "attention/backward_finish.cuh"
#include "attention/backward_mainloop_sm90.cuh"
#include "attention/backward_params.cuh"
#include "attention/backward_prepare.cuh"
#include "attention/backward_work.cuh"
#include "ptx/barrier.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/shared.cuh"

namespace attention {

template <class Config>
inline void backward_prepare(const BackwardArgument& argument) {
  prepare<Config>(argument.params);
}

template <class Config>
inline void backward_finish(const BackwardArgument& argument) {
  if constexpr (Config::finishes)
    finish<Config>(argument.params);
  else
    finish<Config, BackwardMainloopSm90<Config>>(argument.params);
}

// The last block of keys of a head to be done turns the head's sums of dq into dq, while the L2 still holds them:
// sooner than a kernel of its own, as long as they are few. Called by the consumers.
template <class Config>
inline void finish_if_last(const BackwardParams& params, const BackwardWork& work) {
  using Mainloop = BackwardMainloopSm90<Config>;
  static_assert(!Config::varlen, "of packed sequences some have no block of keys");
  __shared__ bool last;
  const int ratio = params.forward.qheads_per_khead;
  if (threadIdx.x == 128) {
    __threadfence();
    const int index = work.batch * (params.forward.num_heads_q / ratio) + work.head;
    last = atomicAdd(params.blocks_done + index, 1) == params.n_blocks - 1;
    __threadfence();
  }
  ptx::bar_sync(1, 128 * Mainloop::consumers);
  if (!last) return;
#pragma unroll 1
  for (int i = 0; i < ratio * params.forward.m_blocks; ++i) {
    const int m_block = i % params.forward.m_blocks, head = work.head * ratio + i / params.forward.m_blocks;
    const i64 row = workspace_row<Config>(params, work.seqlen, work.batch, head) + m_block * Config::block_m;
    finish_tile<Config, Mainloop>(params, {m_block, head, work.batch, work.seqlen, row}, threadIdx.x - 128);
  }
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
    if (threadIdx.x == 0) mainloop.load(argument, work);
    if (warp == 1) mainloop.add_dq(argument.params, work);
    if (Config::finishes) __syncthreads();
  } else {
    ptx::setmaxnreg_inc<Config::consumer_registers>();
    mainloop.consume(argument.params, work, warp / 4 - 1);
    if constexpr (Config::finishes) {
      __syncthreads();  // all of dq is added
      finish_if_last<Config>(argument.params, work);
    }
  }
}

}  // namespace attention
