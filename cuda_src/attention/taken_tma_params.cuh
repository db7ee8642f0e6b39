// attention: the argument of kernels that load through tensor maps, and whose thread blocks take tiles as they come.
#pragma once

#include "attention/params.cuh"
#include "core/types.cuh"
#include "ptx/tma.cuh"

namespace attention {

// The maps are as in attention/tma_params.cuh.
struct TakenTmaParams {
  ptx::TensorMap q, k, v;
  Params params;
  i32* dealt;  // see attention/taken_tiles.cuh
  i32 units;
};

constexpr const Params& params_of(const TakenTmaParams& argument) { return argument.params; }

// Before the main kernel: no tile has been taken.
template <class Config>
inline void taken_begin(const TakenTmaParams& argument) {
  if (threadIdx.x == 0) *argument.dealt = 0;
}

}  // namespace attention
