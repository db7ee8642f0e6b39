// attention: the backward's first kernel for packed sequences. cu_seqlens may hold anything, so this kernel finds what
// each offset counts as (attention/packed.cuh) and writes it down for the others. One thread block does this for q's
// offsets and one for k's.
#pragma once

#include "attention/backward_params.cuh"
#include "attention/packed.cuh"
#include "core/math.cuh"

namespace attention {

// Joins the x of all threads of the block before this one, and sets `all` to the join of the x of all threads. `join`
// is associative, and joins x and 0 to x.
template <class Join>
inline int block_scan(int x, int& all, const Join& join) {
  __shared__ int warps[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, x, step);
    if (lane >= step) x = join(before, x);
  }
  __syncthreads();  // every thread has read what the call before left in `warps`
  if (lane == 31) warps[warp] = x;
  __syncthreads();
  x = __shfl_up_sync(0xffffffffu, x, 1);
  int before = lane == 0 ? 0 : x;
  all = 0;
  for (int w = 0; w < int(blockDim.x / 32); ++w) {
    if (w == warp) before = join(all, before);
    all = join(all, warps[w]);
  }
  return before;
}

template <class Config>
inline void backward_offsets(const BackwardArgument& argument) {
  constexpr int per_thread = 8;  // how many offsets each thread takes at a time
  const Params& params = argument.params.forward;
  const bool keys = blockIdx.x == 1;
  const i32* const from = keys ? params.cu_seqlens_k : params.cu_seqlens_q;
  const i64 stride = keys ? params.cu_seqlens_k_stride : params.cu_seqlens_q_stride;
  const int total = keys ? params.seqlen_k : params.seqlen_q, batch = params.batch;
  PackedOffset* const to = keys ? argument.params.offsets_k : argument.params.offsets_q;
  const auto maximum = [](int a, int b) { return max_of(a, b); };
  const auto sum = [](int a, int b) { return a + b; };
  // The largest of the offsets that are done, and how many sequences that end with one of them have rows. The first
  // offset ends no sequence.
  int largest = clamp(from[0], 0, total), rank = 0;
  for (int first = 0; first <= batch; first += per_thread * blockDim.x) {
    const int begin = first + per_thread * int(threadIdx.x);
    int rows[per_thread], all;
#pragma unroll
    for (int i = 0; i < per_thread; ++i) rows[i] = begin + i <= batch ? clamp(from[(begin + i) * stride], 0, total) : 0;
    int thread_largest = 0;
#pragma unroll
    for (int i = 0; i < per_thread; ++i) thread_largest = max_of(thread_largest, rows[i]);
    const int before = max_of(largest, block_scan(thread_largest, all, maximum));
    largest = max_of(largest, all);
    int live = 0;  // how many sequences end with one of the thread's offsets so far, and have rows
    int ranks[per_thread];
#pragma unroll
    for (int i = 0; i < per_thread; ++i) {
      const int previous = i == 0 ? before : rows[i - 1];
      live += rows[i] > previous;
      rows[i] = max_of(rows[i], previous);
      ranks[i] = live;
    }
    const int ranks_before = rank + block_scan(live, all, sum);
    rank += all;
#pragma unroll
    for (int i = 0; i < per_thread; ++i) {
      if (begin + i <= batch) to[begin + i] = {rows[i], ranks_before + ranks[i]};
    }
  }
}

}  // namespace attention
