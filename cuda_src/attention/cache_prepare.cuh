// attention: what is launched before the main kernels over caches: the plan, and what appends.
#pragma once

#include "attention/cache_append.cuh"
#include "attention/cache_params.cuh"
#include "attention/cache_plan.cuh"
#include "attention/cache_tma_params.cuh"
#include "attention/params.cuh"
#include "attention/variant.cuh"  // which Config names
#include "ptx/grid.cuh"

namespace attention {

// The main kernel may begin at once, and waits for this grid before it needs what that writes.
template <class Config>
inline void cache_prepare(const CacheArgument& argument) {
  const Params& params = argument.params;
  const CacheParams& cache = argument.cache;
  ptx::grid_begin();
  if (cache.divides && blockIdx.x == 0) return clear_counters<Config>(params, cache);
  if (cache.makes_plan && blockIdx.x == 0) {
    // One turn is the fastest for few sequences, and few turns for many.
    return params.batch < Config::prepare_threads ? make_plan<Config, 1>(params, cache)
                                                  : make_plan<Config, 8>(params, cache);
  }
  append<Config>(params, cache, int(blockIdx.x) - cache.makes_plan);
}

// Where the thread blocks of the main kernel take units as they come.
template <class Config>
inline void cache_append(const CacheTmaParams& argument) {
  if (blockIdx.x > 0) return append<Config>(argument.caches.params, argument.caches.cache, int(blockIdx.x) - 1);
  if (threadIdx.x == 0) *argument.dealt = 0;
}

}  // namespace attention
