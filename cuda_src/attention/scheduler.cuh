// attention: which tile of queries, head and sequence a thread block works on.
#pragma once

#include "attention/params.cuh"
#include "attention/seqlen.cuh"
#include "attention/tma_params.cuh"
#include "core/math.cuh"

namespace attention {

struct TileIndex {
  int m_block, head, batch;
};

// Dense: heads in sections whose K and V fit the L2 together; within a section heads run fastest and query tiles go
// from last to first, so that under a causal mask the longest tiles start first. The tile in the middle of a head has
// no partner: then `second` is a tile past the end.
template <class Config>
inline TileIndex dense_tile(const Params& params, int unit, bool second) {
  const int section_units = params.heads_per_section * params.m_units;
  const int section = unit / section_units, within = unit % section_units;
  const int heads = params.num_heads_q / Config::pack;
  const int width = min_of(params.heads_per_section, params.batch * heads - section * params.heads_per_section);
  const int head = section * params.heads_per_section + within % width;
  const int first_row = within / width, last_row = params.m_blocks - 1 - first_row;
  const int m_block = !second ? last_row : first_row < last_row ? first_row : params.m_blocks;
  return {m_block, head % heads, head / heads};
}

// Packed: sequence b owns the slots from cu_seqlens_q[b] / block_m + b to the next sequence's, always enough for its
// tiles, so a slot finds its sequence by bisection and the host needs no lengths. m_block may lie past the end.
template <int block_m>
inline TileIndex varlen_tile(const Params& params, int unit) {
  const int slot = unit / params.num_heads_q;
  const auto first_slot = [&](int b) {
    return clamp(params.cu_seqlens_q[b * params.cu_seqlens_q_stride], 0, params.seqlen_q) / block_m + b;
  };
  int low = 0, high = params.batch;  // first_slot(low) <= slot < first_slot(high)
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (first_slot(middle) <= slot ? low : high) = middle;
  }
  return {first_slot(low + 1) - 1 - slot, unit % params.num_heads_q, low};
}

// A thread block's way through its share of the launch's work. The work comes in units: a unit is a tile, or a pair of
// tiles, the last of a head with its first, the last but one with its second, and so on, so that under a causal mask
// every unit costs the same. Units go round, but for the last, whose tiles the host has shared out one by one: where
// rounds do not come out even, they would leave some blocks a whole unit more than others. Of packed sequences the host
// knows no lengths; what comes first in a round mostly costs more there, and every other round goes the other way.
template <class Config>
struct TileCursor {
  const Deal& deal;
  const int pair;  // tiles of a unit
  int round = 0;   // its first unit
  int place = blockIdx.x;
  bool second = false;  // of the unit's tiles
  int listed = -1;      // which tile of the list it is
  int unit = blockIdx.x;
  bool done = false;

  explicit TileCursor(const TmaParams& params)
      : deal(params.deal), pair(params.params.m_units < params.params.m_blocks ? 2 : 1) {
    if (unit >= deal.round_units) take_listed();
  }

  void advance() {
    if (listed >= 0) return take_listed();
    second = !second && pair == 2;
    if (second) return;
    const int blocks = gridDim.x;
    round += blocks;
    if (Config::varlen) place = blocks - 1 - place;
    unit = round + place;
    if (unit >= deal.round_units) take_listed();
  }

 private:
  void take_listed() {
    if (Config::varlen || (!Config::causal && !Config::window)) {  // nothing is
      done = true;
      return;
    }
    listed = listed < 0 ? deal.begin[blockIdx.x] : listed + 1;
    done = listed >= deal.begin[blockIdx.x + 1];
    if (done) return;
    const int tile = deal.tiles[listed];
    unit = deal.round_units + tile / 2;
    second = tile % 2;
  }
};

}  // namespace attention
