// attention: the forward kernel over caches of keys and values for few query rows of few sequences, for sm_90 and
// newer: a cluster of thread blocks for each tile, which finds itself how long its sequence is. Without new rows to
// append, a step of decoding is one launch.
#pragma once

#include "attention/cache_append.cuh"
#include "attention/cache_params.cuh"
#include "attention/cache_plan.cuh"
#include "attention/cache_work.cuh"
#include "attention/forward_cluster_sm90.cuh"
#include "ptx/grid.cuh"
#include "ptx/shared.cuh"

namespace attention {

// The tile of a cluster. They come sequence by sequence, in a sequence tile by tile, and in a tile head by head. What
// is looked at is not what is appended.
template <class Config>
inline CacheTile<Config> cluster_tile(const Params& params, const CacheParams& cache, int item) {
  static_assert(!Config::varlen, "where packed sequences begin in q is for a plan to say");
  const SmallDivisor heads{cache.num_heads_k, cache.heads_reciprocal};
  const int tile = heads.quotient(item), tiles = params.m_blocks;
  const int sequence = tiles == 1 ? tile : u32(tile) / u32(tiles);
  const Seqlen seqlen = cached_seqlen<Config>(params, cache, sequence, 0, 0);
  CacheTile<Config> found;
  found.take(params, seqlen, sequence, heads.remainder(item), tile - sequence * tiles);
  return found;
}

template <class Config>
inline void forward_cluster_cache_sm90(const CacheArgument& argument) {
  extern __shared__ __align__(1024) char dynamic_smem[];
  const u32 smem = ptx::shared_address(dynamic_smem);
  const typename ClusterMemory<Config>::Exchange exchange(smem + Config::smem_bytes);
  if constexpr (Config::arrives_first) exchange.arrive();
  const CacheTile<Config> tile = cluster_tile<Config>(argument.params, argument.cache, exchange.cluster());
  ptx::grid_wait();
  forward_cluster<Config>(argument.params, tile, exchange, smem);
}

// Appends, and rotates, what the grid above reads, which need not wait for that until it has found its tiles.
template <class Config>
inline void cluster_cache_append(const CacheArgument& argument) {
  ptx::grid_launch_dependents();
  append<Config>(argument.params, argument.cache, int(blockIdx.x));
}

}  // namespace attention
