// attention: how a unit of packed sequences is found in the backward.
#pragma once

#include "attention/packed.cuh"
#include "attention/scheduler.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// A unit is so many rows of a head of a packed sequence, which come in the unit's place of the head.
struct PackedUnit {
  int place, head, batch;
  int units;  // how many units each head of the sequence has; 0 where the unit is no sequence's
};

// Finds what a unit of one of the packed arrays is. A whole warp calls this with the same unit. The lanes probe 32 of
// the offsets that are left, evenly spaced, until one is left.
template <int rows>
inline PackedUnit packed_unit(int unit, const PackedOffset* offsets, int batch, int heads, int heads_per_section) {
  const auto first_unit = [&](int b) { return first_packed_unit<rows>(offsets[b].row, offsets[b].rank); };
  int low = 0, high = batch + 1;  // the first offset whose first unit is past this one is in [low, high]
#pragma unroll 1
  while (low < high) {
    const int step = ceil_div(high - low, 32), probe = low + (int(tile::lane()) + 1) * step - 1;
    const bool before = probe < high && first_unit(probe) <= unit / heads;
    const int count = __popc(__ballot_sync(0xffffffffu, before));
    high = min_of(high, low + (count + 1) * step - 1);
    low += count * step;
  }
  const int b = low - 1;
  if (b < 0 || b == batch) return {0, 0, 0, 0};  // the unit is before the first sequence or past the last
  const int begin = first_unit(b), units = first_unit(b + 1) - begin;
  const UnitIndex index = unit_of(unit - begin * heads, units, heads, heads_per_section);
  return {index.place, index.head, b, units};
}

// The same where a section is all heads of `sequences` sequences, up to 32, that follow each other: the first unit of
// all their heads comes before the second of any. Sequences that have no more units are left out.
template <int rows>
inline PackedUnit packed_unit_beside(int unit, const PackedOffset* offsets, int batch, int heads, int sequences) {
  const PackedUnit alone = packed_unit<rows>(unit, offsets, batch, heads, heads);
  if (alone.units == 0) return alone;
  // Each lane has a sequence of the section.
  const int first = alone.batch - alone.batch % sequences, lane = tile::lane(), own = min_of(first + lane, batch);
  const bool has = lane < sequences && own < batch;
  const int begin = first_packed_unit<rows>(offsets[own].row, offsets[own].rank);
  const int units = has ? first_packed_unit<rows>(offsets[own + 1].row, offsets[own + 1].rank) - begin : 0;
  const auto before = [&](int place) {  // how many units all heads have before a place
    return heads * __reduce_add_sync(0xffffffffu, min_of(units, place));
  };
  const int index = unit - heads * __shfl_sync(0xffffffffu, begin, 0);
  int place = 0;
#pragma unroll 1
  for (int high = __reduce_max_sync(0xffffffffu, units) - 1; place < high;) {
    const int middle = place + ceil_div(high - place, 2);
    if (before(middle) <= index)
      place = middle;
    else
      high = middle - 1;
  }
  const int within = index - before(place);
  const u32 left = __ballot_sync(0xffffffffu, units > place);
  const bool found = units > place && __popc(left & ((1u << lane) - 1)) == within / heads;
  const int of = __ffs(__ballot_sync(0xffffffffu, found)) - 1;
  return {place, within % heads, first + of, __shfl_sync(0xffffffffu, units, of)};
}

}  // namespace attention
