// attention: the forward kernel for few query rows and many keys, for sm_80 and newer: a schedule divides the keys of
// all tiles evenly over thread blocks, and the last of those that share a tile puts its parts together, or, where that
// are many rows, another launch does.
#pragma once

#include "attention/mainloop_split_sm80.cuh"
#include "attention/masks.cuh"
#include "attention/split_merge.cuh"
#include "attention/split_params.cuh"
#include "attention/split_schedule.cuh"
#include "attention/split_work.cuh"
#include "core/math.cuh"
#include "ptx/grid.cuh"
#include "ptx/shared.cuh"
#include "ptx/sync.cuh"
#include "ptx/thread.cuh"

namespace attention {

// What a thread block of this kind leaves in memory.
template <class Config>
using PartialsOf = Partials<Config::block_m, MainloopSplitSm80<Config>::cols>;

// Writes a row, of what thread blocks have left of it; `row` is counted from the tile's first. A warp calls this.
template <class Config, class Work>
inline void finish_left_row(const Params& params, const Work& work, const PartialsOf<Config>& memory,
                            const Sharers& sharers, int row, float scale) {
  using element = ProbabilityOf<Config>;
  constexpr int cols = MainloopSplitSm80<Config>::cols, ahead = cols > 128 || is_same<element, f32> ? 4 : 8;
  const LeftParts<Config::block_m, cols> left{memory, sharers.first};
  LaneSums<cols> sums;
  const auto whole = merge_row<element, 32, ahead>(sums, left, sharers.count, row, scale);
  finish_row<Config>(params, work, work.first_row() + row, whole, sums, scale);
}

// Computes a thread block's part of all items. `counters` holds a zero for each thread block when the grid before has
// ended, and afterwards again; or is null, if the next grid puts parts together.
template <class Config, class Work, class Schedule, class Argument>
inline void forward_split(const Argument& argument, const Schedule& schedule, float* partials, i32* counters,
                          u32 smem) {
  using Mainloop = MainloopSplitSm80<Config>;
  using element = ProbabilityOf<Config>;
  constexpr int cols = Mainloop::cols, warps = Config::num_threads / 32;
  constexpr int group_lanes = Mainloop::groups > 2 ? 4 : 2;
  const Params& params = argument.params;
  const PartialsOf<Config> memory{partials, schedule.one_item()};
  const int block = blockIdx.x;
#pragma unroll 1
  for (auto unit = schedule.first(block); unit.exists();) {
    const Work& work = unit.template work<Work>(argument);
    const float scale = exponent_scale<typename Config::variant>(params, work.k_descale());
    const int begin = work.blocks.begin + unit.begin, end = min_of(work.blocks.begin + unit.end, work.blocks.end);
    {
      typename Mainloop::Out out;
      typename Mainloop::Statistics statistics;
      Mainloop::run(out, statistics, params, work, begin, end, smem, [] {});
      Mainloop::lay_down(out, statistics, smem);
    }
    __syncthreads();
    const Sharers sharers = schedule.sharers(unit.item);
    const int first_row = work.first_row(), live = min_of(Config::block_m, work.rows() - first_row);
    const int warp = ptx::tid_x() / 32;
    const typename Mainloop::Parts parts{smem};
    using Sums = LaneSums<cols, Config::merge_lanes>;
    constexpr int together = warps * (32 / Config::merge_lanes);  // rows that the block puts together at a time
#pragma unroll 1
    for (int first = warp; first < live; first += together) {
      const int own = first + warps * Sums::row(), row = min_of(own, live - 1);
      Sums sums;
      const auto whole = merge_rows<element, group_lanes>(sums, parts, Mainloop::groups, row, scale);
      if (sharers.count == 1)
        finish_row<Config>(params, work, first_row + row, whole, sums, scale, own < live);
      else if (own < live)
        memory.store(block, sharers.first, row, whole, sums);
    }
    if (sharers.count > 1 && counters != nullptr) {
      __syncthreads();  // the block has left all of its part
      bool last = false;
      if (ptx::tid_x() == 0) {
        ptx::grid_wait();
        last = ptx::atom_acq_rel_gpu_inc(counters + sharers.first, sharers.count - 1) == sharers.count - 1;
      }
      if (__syncthreads_or(last)) {
        const LeftParts<Config::block_m, cols> left{memory, sharers.first};
        const bool alone = Config::merge_lanes < 32 && live <= warps;  // each warp has one row at most
#pragma unroll 1
        for (int first = warp; first < live; first += together) {
          const int own = first + (alone ? 0 : warps * Sums::row()), row = min_of(own, live - 1);
          Sums sums;
          const auto whole = alone ? merge_one_row<element>(sums, left, sharers.count, row, scale)
                                   : merge_rows<element, Config::merge_lanes>(sums, left, sharers.count, row, scale);
          finish_row<Config>(params, work, first_row + row, whole, sums, scale,
                             own < live && (!alone || Sums::row() == 0));
        }
      }
    }
    unit = schedule.next(unit, block);
    if (unit.exists()) __syncthreads();  // every warp is done with the parts, over which the next copies go
  }
}

inline EvenSchedule<EqualItems> schedule_of(const SplitParams& argument) {
  return {{argument.item_blocks}, {argument.quotient, argument.remainder}};
}

template <class Config>
inline void forward_split_sm80(const SplitParams& argument) {
  extern __shared__ __align__(1024) char dynamic_smem[];
  ptx::grid_launch_dependents();
  forward_split<Config, SplitWork<Config>>(argument, schedule_of(argument), argument.partials, argument.counters,
                                           ptx::shared_address(dynamic_smem));
}

// Writes the rows of all tiles that several thread blocks of the grid before share, each by a warp of its own.
template <class Config>
inline void forward_split_merge(const SplitParams& argument) {
  constexpr int warps = Config::num_threads / 32, blocks = Config::block_m / warps;  // of a tile
  const Params& params = argument.params;
  const auto schedule = schedule_of(argument);
  const int item = int(blockIdx.x) / blocks, row = int(blockIdx.x) % blocks * warps + int(ptx::tid_x()) / 32;
  const SplitWork<Config> work(argument, item);
  const Sharers sharers = schedule.sharers(schedule.items.item(item));
  if (sharers.count == 1 || work.first_row() + row >= work.rows()) return;
  const PartialsOf<Config> memory{argument.partials, schedule.one_item()};
  ptx::grid_wait();
  finish_left_row<Config>(params, work, memory, sharers, row, exponent_scale<typename Config::variant>(params));
}

// Clears the counters of the thread blocks of the next grid, which need not wait for that until it counts.
template <class Config>
inline void forward_split_clear(const SplitParams& argument) {
  ptx::grid_launch_dependents();
  const int block = int(blockIdx.x) * Config::num_threads + int(ptx::tid_x());
  if (block < argument.num_blocks) argument.counters[block] = 0;
}

}  // namespace attention
