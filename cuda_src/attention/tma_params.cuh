// attention: the argument of kernels that load through tensor maps: the maps, then Params.
#pragma once

#include "attention/params.cuh"
#include "ptx/tma.cuh"

namespace attention {

// The map of q is (columns, heads that share a key head, rows, key heads, batch): see Queries in cufa/_tensor_map.py;
// those of k and v are (columns, rows, heads, batch), or, packed, (columns, clipped rows, heads, rows).
struct TmaParams {
  ptx::TensorMap q, k, v;
  Params params;
};

}  // namespace attention
