// attention: the forward kernel for few query rows of few sequences, for sm_90 and newer: the thread blocks of a
// cluster share a tile's keys in equal parts, and put its rows together in their own shared memory. It is one launch
// that needs no memory beside, since what such calls take is latency.
#pragma once

#include "attention/cluster_merge.cuh"
#include "attention/cluster_params.cuh"
#include "attention/mainloop_split_sm80.cuh"
#include "attention/masks.cuh"
#include "attention/params.cuh"
#include "attention/split_merge.cuh"
#include "attention/split_work.cuh"
#include "core/math.cuh"
#include "ptx/shared.cuh"
#include "ptx/thread.cuh"

namespace attention {

template <class Config>
struct ClusterMemory {
  using Mainloop = MainloopSplitSm80<Config>;
  using Exchange = attention::Exchange<Config::block_m, Mainloop::cols>;
  static_assert(Config::exchange_bytes == sizeof(typename Exchange::Memory), "Config and the exchange disagree on it");
  static_assert(Config::smem_bytes % alignof(typename Exchange::Memory) == 0, "the exchange lies behind the tiles");
  static_assert(Config::max_cluster <= Config::block_m, "each block has a place for a part of each of its rows");
  static_assert((Config::max_cluster & (Config::max_cluster - 1)) == 0, "sizes of clusters are powers of 2");
};

// Computes this block's part of its cluster's work, and puts together the rows that are its own.
template <class Config, class Work>
inline void forward_cluster(const Params& params, const Work& work,
                            const typename ClusterMemory<Config>::Exchange& exchange, u32 smem) {
  using Mainloop = MainloopSplitSm80<Config>;
  using element = ProbabilityOf<Config>;
  constexpr int cols = Mainloop::cols, warps = Config::num_threads / 32;
  constexpr int group_lanes = Mainloop::groups > 2 ? 4 : 2, ahead = cols > 128 ? 4 : 8;
  const float scale = exponent_scale<typename Config::variant>(params, work.k_descale());
  const int first_row = work.first_row(), live = min_of(Config::block_m, work.rows() - first_row);
  {
    const u32 count = max_of(0, work.blocks.end - work.blocks.begin);
    const auto cut = [&](int rank) { return work.blocks.begin + int(count * rank >> exchange.shift); };
    typename Mainloop::Out out;
    typename Mainloop::Statistics statistics;
    Mainloop::run(out, statistics, params, work, cut(exchange.rank), cut(exchange.rank + 1), smem, [&] {
      // The barrier empties the L1 cache, and is over before the first keys have come.
      if constexpr (!Config::arrives_first) exchange.arrive();
      exchange.expect(live);
    });
    Mainloop::lay_down(out, statistics, smem);
  }
  __syncthreads();
  const int warp = int(ptx::tid_x()) / 32;
  const auto merged = [&](LaneSums<cols>& sums, int row) {
    const typename Mainloop::Parts parts{smem};
    return merge_row<element, group_lanes, group_lanes>(sums, parts, Mainloop::groups, row, scale);
  };
  const int first_own = exchange.rank + (warp << exchange.shift);
  if (!exchange.alone()) {
#pragma unroll 1
    for (int row = warp; row < live; row += warps) {
      LaneSums<cols> sums;
      const auto part = merged(sums, row);
      exchange.send(row, part, sums);
    }
    if (first_own >= live) return;
    exchange.wait();
  }
#pragma unroll 1
  for (int row = first_own; row < live; row += warps << exchange.shift) {
    LaneSums<cols> sums;
    const auto whole =
        exchange.alone() ? merged(sums, row)
                         : merge_row<element, Config::max_cluster, ahead>(sums, exchange, exchange.size(), row, scale);
    finish_row<Config>(params, work, first_row + row, whole, sums, scale);
  }
}

template <class Config>
inline void forward_cluster_sm90(const ClusterParams& argument) {
  extern __shared__ __align__(1024) char dynamic_smem[];
  const u32 smem = ptx::shared_address(dynamic_smem);
  const typename ClusterMemory<Config>::Exchange exchange(smem + Config::smem_bytes);
  if constexpr (Config::arrives_first) exchange.arrive();
  const SmallDivisor heads{argument.num_heads_k, argument.heads_reciprocal};
  const int item = exchange.cluster();
  const SplitWork<Config> work(argument.params, heads.quotient(item), heads.remainder(item), 0);
  forward_cluster<Config>(argument.params, work, exchange, smem);
}

}  // namespace attention
