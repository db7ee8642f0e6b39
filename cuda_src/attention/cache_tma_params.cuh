// attention: the argument of kernels that load from caches of keys and values through tensor maps.
#pragma once

#include "attention/cache_params.cuh"
#include "attention/params.cuh"
#include "core/types.cuh"
#include "ptx/tma.cuh"

namespace attention {

// The map of q is as in attention/tma_params.cuh. Those of k and v have the axes (columns, clipped rows, heads, rows,
// caches or pages). The two axes of rows add up, and rows of a box past the clipped rows become zeros, so that it can
// end with what is live: see `load_rows` in attention/cache_tiles_sm90.cuh.
struct CacheTmaParams {
  ptx::TensorMap q, k, v;
  CacheArgument caches;
  i32* dealt;  // see attention/taken_tiles.cuh
  i32 units;
};

constexpr const Params& params_of(const CacheTmaParams& argument) { return argument.caches.params; }

}  // namespace attention
