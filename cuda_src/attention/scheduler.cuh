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

// Heads go in sections whose K and V fit the L2 together; within a section heads run fastest.
struct UnitIndex {
  int row, head;
};

inline UnitIndex unit_of(int unit, int rows, int heads, int heads_per_section) {
  const int section = unit / (heads_per_section * rows), within = unit % (heads_per_section * rows);
  const int width = min_of(heads_per_section, heads - section * heads_per_section);
  return {within / width, section * heads_per_section + within % width};
}

// Dense: query tiles go from last to first, so that under a causal mask the longest start first. The tile in the middle
// of a head has no partner: then `second` is a tile past the end.
template <class Config>
inline TileIndex dense_tile(const Params& params, int unit, bool second) {
  const int heads = params.num_heads_q / Config::pack;
  const UnitIndex index = unit_of(unit, params.m_units, params.batch * heads, params.heads_per_section);
  const int first_row = index.row, last_row = params.m_blocks - 1 - first_row;
  const int m_block = !second ? last_row : first_row < last_row ? first_row : params.m_blocks;
  return {m_block, index.head % heads, index.head / heads};
}

// Which unit of which head of which sequence: of each head, a packed sequence b owns the units from offset b / rows of
// a unit + b to the next sequence's, always enough for its tiles, so a unit finds its sequence by bisection and the
// host needs no lengths. units is 0 where rows are no sequence's.
struct PackedUnit {
  int row, head, batch;
  int units, length;  // of the sequence: units a head, and rows
};

// The first unit of packed sequence b, of each head; offset: of its first row.
inline int first_packed_unit(int offset, int unit_rows, int b) { return offset / unit_rows + b; }

template <class Offset>
inline PackedUnit packed_unit(int unit, int unit_rows, int batch, int heads, int heads_per_section,
                              const Offset& offset) {
  if (batch == 0) return {};
  const auto first_unit = [&](int b) { return first_packed_unit(offset(b), unit_rows, b); };
  int low = 0, high = batch;  // first_unit(low) <= unit of its head < first_unit(high)
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (first_unit(middle) <= unit / heads ? low : high) = middle;
  }
  const int begin = first_unit(low), units = first_unit(low + 1) - begin;
  const int within = unit - begin * heads;
  if (within < 0 || within >= units * heads) return {};  // before the first sequence, or past the last
  const UnitIndex index = unit_of(within, units, heads, heads_per_section);
  return {index.row, index.head, low, units, offset(low + 1) - offset(low)};
}

// Packed. A tile may lie past the end.
template <class Config>
inline TileIndex varlen_tile(const Params& params, int unit, bool second) {
  const bool pairs = params.m_units < params.m_blocks;
  const PackedUnit found = packed_unit(
      unit, pairs ? 2 * Config::block_m : Config::block_m, params.batch, params.num_heads_q, params.heads_per_section,
      [&](int b) { return clamp(params.cu_seqlens_q[b * params.cu_seqlens_q_stride], 0, params.seqlen_q); });
  if (found.units == 0) return {params.m_blocks, 0, 0};
  if (!pairs) return {found.units - 1 - found.row, found.head, found.batch};
  const int first_row = found.row, last_row = ceil_div(found.length, Config::block_m) - 1 - first_row;
  const bool idle = second ? first_row >= last_row : first_row > last_row;
  return {idle ? params.m_blocks : second ? first_row : last_row, found.head, found.batch};
}

// A thread block's way through its share of the launch's work. The work comes in units: a unit is a tile, or a pair of
// tiles, the last of a head with its first, the last but one with its second, and so on, so that under a causal mask
// every unit costs the same. Units go round, but for the last, whose tiles the host has shared out one by one: where
// rounds do not come out even, they would leave some blocks a whole unit more than others. Of packed sequences the host
// knows no lengths; every other round goes the other way there, so that no block is first in all of them.
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
