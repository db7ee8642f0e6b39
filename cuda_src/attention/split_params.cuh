// attention: what the forward kernel with split keys is told: its argument. The host packs the same layout.
#pragma once

#include "attention/params.cuh"
#include "core/types.cuh"

namespace attention {

struct SplitParams {
  Params params;
  float* partials;  // of two items per thread block: see split_merge.cuh
  i32* counters;    // one per thread block, or null
  i32 num_blocks, num_heads_k;
  i32 item_blocks;          // blocks of keys that a tile of queries sees at most
  i32 quotient, remainder;  // of all blocks of keys by the thread blocks: see split_schedule.cuh
};

}  // namespace attention
