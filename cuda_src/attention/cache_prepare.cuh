// attention: what is launched before the main kernel over caches: the plan, and what appends.
#pragma once

#include "attention/cache_append.cuh"
#include "attention/cache_params.cuh"
#include "attention/cache_plan.cuh"
#include "attention/params.cuh"
#include "attention/variant.cuh"  // which Config names

namespace attention {

template <class Config>
inline void cache_prepare(const CacheArgument& argument) {
  const Params& params = argument.params;
  const CacheParams& cache = argument.cache;
  if (cache.makes_plan && blockIdx.x == 0) {
    // One turn is the fastest for few sequences, and few turns for many.
    return params.batch < Config::prepare_threads ? make_plan<Config, 1>(params, cache)
                                                  : make_plan<Config, 8>(params, cache);
  }
  append<Config>(params, cache, int(blockIdx.x) - cache.makes_plan);
}

}  // namespace attention
