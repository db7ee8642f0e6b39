// attention: what the forward kernel with clusters is told: its argument. The host packs the same layout.
#pragma once

#include "attention/params.cuh"
#include "core/types.cuh"

namespace attention {

struct ClusterParams {
  Params params;
  i32 num_heads_k, heads_reciprocal;  // of SmallDivisor; a key head of a sequence is one tile
};

}  // namespace attention
