// attention: the argument of the kernel for many packed sequences, which loads through tensor maps.
#pragma once

#include "attention/params.cuh"
#include "core/types.cuh"
#include "ptx/tma.cuh"

namespace attention {

// The maps are as in attention/tma_params.cuh.
struct PackedTmaParams {
  ptx::TensorMap q, k, v;
  Params params;
  i32* dealt;  // see attention/taken_tiles.cuh
  i32 units;
};

constexpr const Params& params_of(const PackedTmaParams& argument) { return argument.params; }

}  // namespace attention
