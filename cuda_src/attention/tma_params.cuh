// attention: the argument of kernels that load through tensor maps: the maps, then Params.
#pragma once

#include "attention/params.cuh"
#include "ptx/tma.cuh"

namespace attention {

// The maps' axes are (columns, rows, heads, batch); those of packed k and v (columns, clipped rows, heads, rows), see
// _keys in cufa/_tensor_map.py.
struct TmaParams {
  ptx::TensorMap q, k, v;
  Params params;
};

}  // namespace attention
