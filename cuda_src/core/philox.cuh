// core: Philox 4x32-7, a random number generator without state: numbers follow from a key and a counter (Salmon,
// Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011). With 7 rounds it passes all of BigCrush,
// with fewer it does not.
#pragma once

#include "core/types.cuh"

inline constexpr int philox_rounds = 7;

// The round keys of a key that is known late: words that are as quickly made as read.
struct PhiloxKey {
  u32 low, high;

  u32 operator[](int i) const { return i % 2 == 0 ? low + i / 2 * 0x9e3779b9u : high + i / 2 * 0xbb67ae85u; }
};

// x ← the numbers of counter x. Round r has the words 2 r and 2 r + 1 of `keys`: those of the key, to which
// 0x9e3779b9 and 0xbb67ae85 are added from one round to the next.
template <class Keys>
inline void philox(u32 (&x)[4], const Keys& keys) {
#pragma unroll
  for (int r = 0; r < philox_rounds; ++r) {
    const u64 first = u64(0xd2511f53u) * x[0], second = u64(0xcd9e8d57u) * x[2];
    x[0] = u32(second >> 32) ^ x[1] ^ keys[2 * r];
    x[1] = u32(second);
    x[2] = u32(first >> 32) ^ x[3] ^ keys[2 * r + 1];
    x[3] = u32(first);
  }
}
