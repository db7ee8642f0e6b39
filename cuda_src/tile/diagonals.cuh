// tile: sums over the diagonals of a warp's accumulator, of which each lane holds a few in the end.
#pragma once

#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/thread.cuh"

namespace warp {

// One step of it: two groups of lanes hold numbers, and number i of the one is added to number i + h of the other. From
// then on they are one group of twice the lanes and half the slots: the first group keeps what it has in even slots,
// and the `second` what belongs to the first's odd ones, in odd slots or, in lanes where that lies `behind`, in the
// next.
template <int n>
inline void join_groups(float (&to)[(n + 1) / 2], const float (&from)[n], bool second, bool behind, int partner) {
  const auto at = [&](int slot) { return slot < n ? from[slot] : 0.0f; };
  const bool later = second && behind;
#pragma unroll
  for (int s = 0; s < (n + 1) / 2; ++s) {
    const float given = second && !behind ? at(2 * s) : at(2 * s + 1);
    const float kept = later ? at(2 * s + 2) : second ? at(2 * s + 1) : at(2 * s);
    to[s] = kept + __shfl_sync(0xffffffffu, given, partner);
  }
}

// The sums over all diagonals of 8 rows, of which a lane holds columns 8 d + 2 (lane % 4) and the next of row lane / 4.
template <int columns>
struct Diagonals {
  static constexpr int slots = ((columns + 2) / 2 + 1) / 2;

  float sums[slots];
  int place;

  // The diagonal of slot s: a column less its row.
  int diagonal(int s) const { return 32 * s + place - 8; }

  explicit Diagonals(const float (&x)[columns][2]) {
    const int lane = ptx::laneid(), row = lane / 4, quad = lane % 4;
    const bool odd = row & 1, upper = row & 2, last = row & 4;
    // Rows in pairs: the even one's sums are those of even diagonals, counted from its own first column, and the odd
    // one's those of odd ones.
    float pairs[columns + 1], fours[(columns + 2) / 2];
    const int neighbour = odd ? lane - 4 - quad + (quad + 3) % 4 : lane + 4;
    const bool next = odd && quad == 0;
#pragma unroll
    for (int s = 0; s <= columns; ++s) {
      const float given = s > 0 ? x[s - 1][1] : 0.0f, own = s > 0 ? x[s - 1][0] : 0.0f;
      const float kept = next ? (s < columns ? x[s][0] : 0.0f) : own;
      pairs[s] = kept + __shfl_sync(0xffffffffu, given, neighbour);
    }
    place = odd ? 2 * ((quad + 3) % 4) + 1 : 2 * quad;
    // Pairs of pairs, 2 columns apart, and pairs of these, 4 columns apart.
    join_groups(fours, pairs, upper, place < 2, (upper ? lane - 8 : lane + 8) - quad + (quad + (upper ? 3 : 1)) % 4);
    if (upper) place = 8 + (place + 6) % 8;
    const int there = (place + (last ? 12 : 4)) % 16, in_pair = there < 8 ? there : (there - 6) % 8;
    const int its_quad = in_pair % 2 == 0 ? in_pair / 2 : (in_pair / 2 + 1) % 4;
    join_groups(sums, fours, last, place < 4, (last ? 0 : 16) + there / 8 * 8 + in_pair % 2 * 4 + its_quad);
    if (last) place = 16 + (place + 12) % 16;
  }
};

}  // namespace warp
