// attention: the forward kernel for sm_80 and newer: one thread block per tile of queries, or per few tiles, where
// there are many packed sequences.
#pragma once

#include "attention/epilogue.cuh"
#include "attention/epilogue_empty.cuh"
#include "attention/mainloop_sm80.cuh"
#include "attention/masks.cuh"
#include "attention/packed.cuh"
#include "attention/params.cuh"
#include "attention/work.cuh"
#include "core/math.cuh"
#include "ptx/shared.cuh"
#include "ptx/thread.cuh"
#include "tile/shared.cuh"

namespace attention {

template <class Config>
inline void forward_tile(const Params& params, const PointerWork<Config>& work, u32 smem) {
  using element = typename Config::element;
  using Mainloop = MainloopSm80<Config>;
  using Staging = tile::SharedTile<element, Config::block_m, Config::tile_head_dim_v>;
  static_assert(Config::smem_bytes == max_of(Mainloop::smem_bytes, Staging::bytes),
                "Config and the tiles disagree on shared memory");
  static_assert(Config::pack == 1, "no heads share a tile here");
  static_assert(Config::stages == 1 || Staging::bytes <= sizeof(typename Mainloop::Q::Storage),
                "copies of zeros behind the last block are not waited for, so the epilogue must not write there");
  if (work.idle()) return;
  constexpr bool often_empty = Config::mask::hides_last || Config::varlen;
  if (often_empty && work.blocks.empty()) {
    return epilogue_empty<Config, Config::num_threads>(params, work, work.sink(params), ptx::tid_x());
  }
  typename Mainloop::Out out;
  typename Mainloop::Statistics statistics;
  if (!often_empty && work.blocks.empty()) {  // there is no key at all
    out.zero();
    statistics.init();
  } else {
    Mainloop::run(out, statistics, params, work, smem);
    __syncthreads();  // every warp is done with the tiles the epilogue writes over
  }
  statistics.settle(exponent_scale<typename Config::variant>(params));
  const float gain = Config::variant::gain(params.terms);
  const auto totals = statistics.template totals<Config::sinks>(work.sink(params), gain);
  totals.divide(out);
  epilogue<Config>(out, totals, params, work, Mainloop::warp_row(), Mainloop::warp_col(), Staging{smem});
}

template <class Config>
inline void forward_sm80(const Params& params) {
  extern __shared__ __align__(1024) char dynamic_smem[];
  __shared__ PointerWork<Config> work;
  __shared__ PackedScan scan;
  const u32 smem = ptx::shared_address(dynamic_smem);

  if constexpr (Config::many) {
    // The search for one of many sequences passes many others, so a block takes some units in a row. What it remembers
    // from one unit to the next is in shared memory, since registers are few.
    __shared__ int unit, end;
    if (ptx::tid_x() == 0) {
      scan.init();
      unit = blockIdx.x * params.units_per_block;
      end = min_of(unit + params.units_per_block, params.m_units * params.num_heads_q);
    }
    __syncthreads();
#pragma unroll 1
    while (unit < end) {
      if (ptx::tid_x() < 32) work.find(params, scan, unit);
      __syncthreads();
      forward_tile<Config>(params, work, smem);
      __syncthreads();  // every warp is done with `work` and `unit`
      if (ptx::tid_x() == 0) ++unit;
      __syncthreads();
    }
  } else {
    if (Config::varlen && ptx::tid_x() == 0) scan.init();
    if (ptx::tid_x() < 32) {
      __syncwarp();
      work.find(params, scan, blockIdx.x);
    }
    __syncthreads();
    forward_tile<Config>(params, work, smem);
  }
  if constexpr (Config::varlen) {
    clear_outside<Config, Config::scan_groups>(params, ptx::tid_x() / 32, Config::num_threads / 32);
  }
}

}  // namespace attention
