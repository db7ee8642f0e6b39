// attention: the scheduler says which tile of queries, head and sequence a thread block works on.
#pragma once

#include "attention/masks.cuh"
#include "attention/packed.cuh"
#include "attention/params.cuh"
#include "attention/seqlen.cuh"
#include "attention/tma_params.cuh"
#include "core/math.cuh"

namespace attention {

struct TileIndex {
  int m_block, head, batch;
};

// A head's work comes in units: tiles of queries, pairs of those or, in the backward, blocks of keys. Units are
// numbered section by section. A section is as many heads as have K and V that fit the L2 together. Within a section
// the head changes with every unit, and the place of the unit in its head changes when all heads of the section have
// had a turn.
struct UnitIndex {
  int place, head;
};

constexpr UnitIndex unit_of(int unit, int units_per_head, int heads, int heads_per_section) {
  const int section = unit / (heads_per_section * units_per_head);
  const int within = unit % (heads_per_section * units_per_head);
  const int width = min_of(heads_per_section, heads - section * heads_per_section);
  return {within / width, section * heads_per_section + within % width};
}

constexpr bool in_last_section(const Params& params, int head, int heads) {
  return head / params.heads_per_section == (heads - 1) / params.heads_per_section;
}

// The tile of a unit of dense arrays. Tiles of a head go from last to first, so that under a causal mask the longest
// start first. Where sequences share what a score term reads for a head, that head of all sequences comes before the
// next, so that the term finds in the L2 what it has read for another sequence. The tile in the middle of a head has no
// partner, so the second tile of its unit is one past the end.
template <class Config>
constexpr TileIndex dense_tile(const Params& params, int unit, bool second) {
  const int heads = params.num_heads_q / Config::pack;
  const UnitIndex index = unit_of(unit, params.m_units, params.batch * heads, params.heads_per_section);
  const int first_tile = index.place, last_tile = params.m_blocks - 1 - first_tile;
  const int m_block = !second ? last_tile : first_tile < last_tile ? first_tile : params.m_blocks;
  if constexpr (Config::variant::sequences_share) {
    const int ratio = params.qheads_per_khead, group = index.head / ratio;
    return {m_block, group / params.batch * ratio + index.head % ratio, group % params.batch};
  }
  if constexpr (Config::mask::Blocks::sorted) {
    // The heads that come last have the longest tiles first. Those before leave them in place, beside tiles that read
    // the same keys.
    const int batch = index.head / heads, head = index.head % heads;
    if (in_last_section(params, index.head, params.batch * heads)) {
      const int key_head = Config::pack > 1 ? head : head / params.qheads_per_khead;
      return {Config::mask::template longest_tile<Config>(params, batch, key_head, first_tile), head, batch};
    }
  }
  return {m_block, index.head % heads, index.head / heads};
}

// Says whether a unit of the launch is a pair of tiles.
constexpr bool in_pairs(const Params& params) { return params.m_units < params.m_blocks; }

// The tile of a unit of packed arrays, in the sequence that was found for the unit. The tile may lie past the end of
// the sequence, and does so where no sequence was found.
template <class Config>
constexpr TileIndex packed_tile(const Params& params, const PackedSequence& sequence, int unit, bool second) {
  if (sequence.batch < 0) return {params.m_blocks, 0, 0};
  const bool pairs = in_pairs(params);
  const int heads = params.num_heads_q, batch = sequence.batch;
  const int first_unit = first_packed_unit<Config::block_m>(sequence.q_begin, batch, pairs);
  const int units = first_packed_unit<Config::block_m>(sequence.q_end, batch + 1, pairs) - first_unit;
  const UnitIndex index = unit_of(unit - first_unit * heads, units, heads, params.heads_per_section);
  if (!pairs) return {units - 1 - index.place, index.head, batch};
  const int first_tile = index.place, tiles = ceil_div(sequence.q_end - sequence.q_begin, Config::block_m);
  const int last_tile = tiles - 1 - first_tile;
  const bool idle = second ? first_tile >= last_tile : first_tile > last_tile;
  return {idle ? params.m_blocks : second ? first_tile : last_tile, index.head, batch};
}

// The cursor takes a thread block through its share of the tiles of dense arrays. A unit is a tile or a pair of tiles:
// the last tile of a head goes with the first, the last but one with the second, and so on, so that under a causal mask
// every unit costs the same. Thread blocks take units in rounds, one unit per block and round, but for the last units:
// the host has listed their tiles block by block (see Deal), because a last round that not all blocks take part in
// would leave some of them a whole unit more than others.
template <class Config>
struct DenseCursor {
  const Deal& deal;
  const int unit_tiles;    // how many tiles a unit has
  int round_begin = 0;     // the first unit of the round
  bool of_second = false;  // whether the tile is the unit's second
  int listed = -1;         // where the list has the tile; negative: the tile is in a round
  int at = blockIdx.x;     // the unit
  bool at_end = false;

  explicit DenseCursor(const TmaParams& params) : deal(params.deal), unit_tiles(in_pairs(params.params) ? 2 : 1) {
    if (at >= deal.round_units) take_listed();
  }

  int unit() const { return at; }
  bool second() const { return of_second; }
  bool done() const { return at_end; }

  void advance() {
    if (listed >= 0) return take_listed();
    of_second = !of_second && unit_tiles == 2;
    if (of_second) return;
    round_begin += gridDim.x;
    at = round_begin + blockIdx.x;
    if (at >= deal.round_units) take_listed();
  }

 private:
  void take_listed() {
    if (!Config::mask::hides_last) {  // the host lists tiles only under a mask
      at_end = true;
      return;
    }
    listed = listed < 0 ? deal.begin[blockIdx.x] : listed + 1;
    at_end = listed >= deal.begin[blockIdx.x + 1];
    if (at_end) return;
    const int tile = deal.tiles[listed];
    at = deal.round_units + tile / 2;
    of_second = tile % 2;
  }
};

// The unit of packed arrays that one of the launch's blocks takes in a round. Every other round goes through the blocks
// backwards, so that no block comes first in all rounds.
constexpr int unit_in_round(int round, int block, int blocks) {
  return round * blocks + (round % 2 ? blocks - 1 - block : block);
}

// The cursor takes a thread block through its share of the tiles of packed arrays. The host knows no lengths, so it
// lists no tiles. The cursor is a mere count, because the warp that holds it has few registers.
struct PackedCursor {
  const TmaParams& params;
  int count = 0;  // how many tiles the cursor has passed

  explicit PackedCursor(const TmaParams& params) : params(params) {}

  bool pairs() const { return in_pairs(params.params); }
  int unit() const {
    const int round = count >> pairs(), blocks = gridDim.x, block = blockIdx.x;
    return unit_in_round(round, block, blocks);
  }
  bool second() const { return pairs() && count % 2; }
  bool done() const { return unit() >= params.deal.round_units; }
  void advance() { ++count; }
};

template <bool condition, class A, class B>
struct Choose {
  using type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using type = B;
};

template <class Config>
using TileCursor = typename Choose<Config::varlen, PackedCursor, DenseCursor<Config>>::type;

}  // namespace attention
