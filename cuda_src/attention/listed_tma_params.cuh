// attention: the argument of kernels that load through tensor maps what the blocks of a list need.
#pragma once

#include "attention/params.cuh"
#include "core/types.cuh"
#include "ptx/tma.cuh"

namespace attention {

// The maps are as in attention/tma_params.cuh.
struct ListedTmaParams {
  ptx::TensorMap q, k, v;
  Params params;
  i32* dealt;  // see attention/taken_tiles.cuh
  i32 units;
};

constexpr const Params& params_of(const ListedTmaParams& argument) { return argument.params; }

}  // namespace attention
