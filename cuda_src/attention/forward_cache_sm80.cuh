// attention: the forward kernel over caches of keys and values, for sm_80 and newer: the main loop for few query rows,
// on sequences whose lengths and pages only the device knows.
#pragma once

#include "attention/cache_params.cuh"
#include "attention/cache_prepare.cuh"
#include "attention/cache_work.cuh"
#include "attention/epilogue_empty.cuh"
#include "attention/forward_split_sm80.cuh"
#include "ptx/grid.cuh"
#include "ptx/shared.cuh"
#include "ptx/thread.cuh"

namespace attention {

template <class Config>
inline void forward_cache_sm80(const CacheArgument& argument) {
  extern __shared__ __align__(1024) char dynamic_smem[];
  static_assert(sizeof(CacheMemory<Config>) <= Config::work_bytes && Config::smem_bytes % 16 == 0,
                "the work lies behind the tiles");
  CacheMemory<Config>& own = *reinterpret_cast<CacheMemory<Config>*>(dynamic_smem + Config::smem_bytes);
  const CacheSchedule<Config> schedule{argument.params, argument.cache, own};
  if (schedule.divides()) schedule.divide();
  // The grid before makes the plan and writes to caches; of counters alone forward_split takes care.
  if (!schedule.divides() || argument.cache.appends) ptx::grid_wait();
  const PlanMemory plan(argument.params, argument.cache);
  forward_split<Config, CacheTile<Config>>(argument, schedule, argument.cache.partials, plan.counters,
                                           ptx::shared_address(dynamic_smem));
  if (schedule.divides()) ptx::grid_wait();  // this grid does not end before that
  if constexpr (Config::varlen) {
    clear_outside<Config>(argument.params, ptx::tid_x() / 32, Config::num_threads / 32);
  }
}

}  // namespace attention
