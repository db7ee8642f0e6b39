// attention: the forward kernel for sm_90: thread blocks that work through their share of the tiles, a warpgroup that
// loads and others that compute.
#pragma once

#include "attention/epilogue_empty.cuh"
#include "attention/mainloop_sm90.cuh"
#include "attention/tma_params.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/thread.cuh"

namespace attention {

// All tiles of a source: see GivenTiles.
template <class Config, class Source>
inline void forward_tiles(const typename Source::Argument& argument) {
  using Mainloop = MainloopSm90<Config, Source>;
  static_assert(Config::smem_bytes >= Mainloop::smem_bytes && Config::smem_bytes < Mainloop::smem_bytes + 1024,
                "Config and the tiles disagree on shared memory");
  static_assert(Config::num_threads == 128 * (1 + Mainloop::consumers), "a warpgroup loads, the others compute");
  extern __shared__ __align__(1024) char dynamic_smem[];
  const Mainloop mainloop(dynamic_smem);
  __shared__ PackedScan scan;

  if (threadIdx.x == 0) {
    mainloop.init();
    if (Config::varlen) scan.init();
  }
  __syncthreads();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (likely(warp < 4)) {  // these come first in the code, since the others wait for what they load
    ptx::setmaxnreg_dec<Config::producer_registers>();
    if (warp != 0) {  // of the two orders of these branches this one starts sooner
      if (Source::load_lanes == 1 ? threadIdx.x == 32 : warp == 1) mainloop.load_tiles(argument);
    } else {
      mainloop.find_tiles(argument, scan);
    }
    constexpr int first_idle = Config::stages_terms ? 3 : 2;
    if constexpr (Config::stages_terms) {
      if (warp == 2) stage_terms(mainloop, argument);
    }
    const int idle_warp = ptx::tid_x() / 32 - first_idle;
    if constexpr (Config::varlen) {
      if (warp >= first_idle) clear_outside<Config>(params_of(argument), idle_warp, 4 - first_idle);
    } else if constexpr (Config::empty_rows) {
      __shared__ Work<Config> works[2];
      if (warp >= first_idle) {
        write_empty_tiles<Config>(params_of(argument), works[idle_warp], idle_warp, 4 - first_idle);
      }
    }
  } else {
    ptx::setmaxnreg_inc<Config::consumer_registers>();
    mainloop.consume(params_of(argument), warp / 4 - 1);
    mainloop.repair_tiles(argument, warp / 4 - 1);
  }
}

template <class Config>
inline void forward_sm90(const TmaParams& argument) {
  static_assert(!Config::mask::Blocks::sorted, "tiles of lists do not come in pairs: see forward_listed_sm90");
  forward_tiles<Config, GivenTiles<Config>>(argument);
}

}  // namespace attention
