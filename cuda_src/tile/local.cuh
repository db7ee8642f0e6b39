// tile: sums of accumulators in local memory, which is a thread's own.
//
// The tensor cores round toward zero, so a sum of many products is too small: by 1e-5 after 2^14 rows, and by ever more
// after that. Longer sums are therefore computed in chains: at the end of each, what the accumulator holds is taken
// over, added to the sum here, rounding to nearest. That happens too seldom to cost anything.
#pragma once

#include "ptx/local.cuh"
#include "tile/accumulator.cuh"

namespace tile {

// About how many rows' products an accumulator adds up before it is taken over: the length of a chain.
inline constexpr int chain_rows = 1 << 14;

// The same in blocks of rows.
constexpr int chain_blocks(int block_rows) { return (chain_rows + block_rows - 1) / block_rows; }

// One number for each row that a thread holds.
template <int m_tiles>
struct LocalRows {
  float x[m_tiles][2];

  float load(int t, int i) const { return ptx::ld_local_f32(ptx::local_address(x) + (2 * t + i) * sizeof(float)); }
  void store(int t, int i, float value) {
    ptx::st_local_f32(ptx::local_address(x) + (2 * t + i) * sizeof(float), value);
  }
};

template <int m_tiles, int cols>
struct LocalSums {
  float x[m_tiles * cols / 2];

  // x ← old_factors · x + factors · sums for each row that a thread holds, or, the `first` time, sums. Then sums are
  // zeros, or, the `last` time, x.
  void take_over(Accumulator<m_tiles, cols>& sums, const float (&old_factors)[m_tiles][2],
                 const float (&factors)[m_tiles][2], bool first, bool last) {
    u32 address = ptx::local_address(x);
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int j = 0; j < cols / 8; ++j) {
        if (j % 2 == 0) __syncwarp();  // loads stay where they are: registers are few
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& sum = sums.x[t][j][e];
          const float old = ptx::ld_local_f32(address);
          const float now = first ? sum : fmaf(old_factors[t][e / 2], old, factors[t][e / 2] * sum);
          ptx::st_local_f32(address, now);
          sum = last ? now : 0.0f;
          address += sizeof(float);
        }
      }
    }
  }

  // The same where all terms count alike.
  void take_over(Accumulator<m_tiles, cols>& sums, bool first, bool last) {
    float ones[m_tiles][2];
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) ones[t][0] = ones[t][1] = 1.0f;
    take_over(sums, ones, ones, first, last);
  }
};

// The same in other memory, where the numbers of one thread are `threads` apart, and where all terms count alike. Where
// a loop uses local memory, the compiler holds in registers of each thread what all threads share; some loops cannot
// spare these registers.
template <int threads, int cols>
inline void take_over(Accumulator<1, cols>& sums, float* memory, bool first, bool last) {
#pragma unroll
  for (int j = 0; j < cols / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float& x = memory[(4 * j + e) * threads];
      float& sum = sums.x[0][j][e];
      x = first ? sum : x + sum;
      sum = last ? x : 0.0f;
    }
  }
}

}  // namespace tile
