// tile: exchanging what the four lanes of a quad have read of a row of an accumulator. A lane reads at once what lies
// side by side, and is to have every fourth pair of columns.
#pragma once

#include "core/types.cuh"
#include "ptx/thread.cuh"

namespace tile {

namespace quad {

constexpr u32 all_lanes = 0xffffffffu;

// Lanes that differ in a bit of their numbers exchange: those with the bit keep `high` and get the other's `high` as
// `low`, those without keep `low` and get the other's `low` as `high`.
template <int bit>
inline void swap(u32& low, u32& high) {
  const bool upper = ptx::laneid() & bit;
  const u32 got = __shfl_xor_sync(all_lanes, upper ? low : high, bit);
  low = upper ? got : low;
  high = upper ? high : got;
}

// Words 4 c to 4 c + 3 of lane c → words c, c + 4, c + 8 and c + 12.
inline void deal(u32& x0, u32& x1, u32& x2, u32& x3) {
  swap<1>(x0, x1);
  swap<1>(x2, x3);
  swap<2>(x0, x2);
  swap<2>(x1, x3);
}

// Words 2 c and 2 c + 1 of lane c → words c and c + 4. Lanes 0 and 1 have words that go to c, the others to c + 4, so
// a lane gets one of either kind from two rounds, in each of which every lane gives one.
inline void deal(u32& x0, u32& x1) {
  const u32 lane = ptx::laneid();
  const bool upper = lane & 2, odd = lane & 1;
  const u32 one = __shfl_sync(all_lanes, upper ? x1 : x0, 2 * (lane & 1) + (lane >> 1 & 1), 4);
  const u32 other = __shfl_sync(all_lanes, upper ? x0 : x1, 2 * (~lane & 1) + (lane >> 1 & 1), 4);
  x0 = odd ? other : one;
  x1 = odd ? one : other;
}

// The same of halves of words, which come as pairs in the order of their numbers: 8, 4 or 2 of a lane.
inline void deal_halves(u32& x0, u32& x1, u32& x2, u32& x3) {
  const u32 low0 = __byte_perm(x0, x2, 0x5410), high0 = __byte_perm(x0, x2, 0x7632);
  const u32 low1 = __byte_perm(x1, x3, 0x5410), high1 = __byte_perm(x1, x3, 0x7632);
  x0 = low0, x1 = high0, x2 = low1, x3 = high1;  // half m with half m + 4, which go to the same lane
  deal(x0, x1, x2, x3);
}

inline void deal_halves(u32& x0, u32& x1) {
  swap<2>(x0, x1);
  const u32 chosen = ptx::laneid() & 1 ? 0x3276 : 0x5410;
  x0 = __byte_perm(x0, __shfl_xor_sync(all_lanes, x0, 1), chosen);
  x1 = __byte_perm(x1, __shfl_xor_sync(all_lanes, x1, 1), chosen);
}

inline void deal_halves(u32& x0) {
  const u32 lane = ptx::laneid(), half = lane >> 1 & 1;
  const u32 low = __shfl_sync(all_lanes, x0, half, 4), high = __shfl_sync(all_lanes, x0, 2 + half, 4);
  x0 = __byte_perm(low, high, lane & 1 ? 0x7632 : 0x5410);
}

}  // namespace quad

}  // namespace tile
