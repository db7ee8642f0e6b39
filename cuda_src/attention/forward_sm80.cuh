// attention: the forward kernel for sm_80 and newer: one thread block a tile of queries.
#pragma once

#include "attention/block_range.cuh"
#include "attention/epilogue.cuh"
#include "attention/mainloop_sm80.cuh"
#include "attention/params.cuh"
#include "attention/work.cuh"
#include "core/math.cuh"
#include "ptx/shared.cuh"
#include "tile/shared.cuh"

namespace attention {

template <class Config>
inline void forward_sm80(const Params& params) {
  using element = typename Config::element;
  using Mainloop = MainloopSm80<Config>;
  using Staging = tile::SharedTile<element, Config::block_m, Config::tile_head_dim_v>;
  static_assert(Config::smem_bytes == max_of(Mainloop::smem_bytes, Staging::bytes),
                "cufa/_configs.py and the tiles disagree on shared memory");
  extern __shared__ __align__(1024) char dynamic_smem[];
  __shared__ PointerWork<element> work;
  const u32 smem = ptx::shared_address(dynamic_smem);

  if (threadIdx.x == 0) work.template find<Config>(params, blockIdx.x);
  __syncthreads();
  if (work.template idle<Config>()) return;

  typename Mainloop::Out out;
  typename Mainloop::Statistics statistics;
  if (work.range.empty()) {
    out.zero();
    statistics.init();
  } else {
    Mainloop::run(out, statistics, params, work, smem);
    __syncthreads();  // every warp is done with the tiles the epilogue writes over
  }
  statistics.finish(out, Config::sinks ? params.sinks[work.tile.head * params.sinks_stride] : -infinity);
  epilogue<Config>(out, statistics, params, work, Mainloop::warp_row(), Mainloop::warp_col(), Staging{smem});
}

}  // namespace attention
