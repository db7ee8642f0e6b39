// attention: which tile of queries, head and sequence a thread block works on.
#pragma once

#include "attention/params.cuh"
#include "attention/seqlen.cuh"
#include "core/math.cuh"

namespace attention {

struct TileIndex {
  int m_block, head, batch;
};

// Dense: heads in sections whose K and V fit the L2 together; within a section heads run fastest and query tiles go
// from last to first, so that under a causal mask the longest tiles start first.
inline TileIndex dense_tile(const Params& params, int linear) {
  const int section_tiles = params.heads_per_section * params.m_blocks;
  const int section = linear / section_tiles, within = linear % section_tiles;
  const int width =
      min_of(params.heads_per_section, params.batch * params.num_heads_q - section * params.heads_per_section);
  const int head = section * params.heads_per_section + within % width;
  return {params.m_blocks - 1 - within / width, head % params.num_heads_q, head / params.num_heads_q};
}

// Packed: sequence b owns the slots from cu_seqlens_q[b] / block_m + b to the next sequence's, always enough for its
// tiles, so a slot finds its sequence by bisection and the host needs no lengths. m_block may lie past the end.
template <int block_m>
inline TileIndex varlen_tile(const Params& params, int linear) {
  const int slot = linear / params.num_heads_q;
  const auto first_slot = [&](int b) {
    return clamp(params.cu_seqlens_q[b * params.cu_seqlens_q_stride], 0, params.seqlen_q) / block_m + b;
  };
  int low = 0, high = params.batch;  // first_slot(low) <= slot < first_slot(high)
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (first_slot(middle) <= slot ? low : high) = middle;
  }
  return {slot - first_slot(low), linear % params.num_heads_q, low};
}

}  // namespace attention
