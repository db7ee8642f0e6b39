// tile: a warp's float32 accumulator, m_tiles × 16 rows by cols columns, in the register layout of mma.m16n8.
#pragma once

#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/thread.cuh"

namespace tile {

// x[t][j][2 * i + e] is row 16 t + lane / 4 + 8 i and column 8 j + 2 (lane % 4) + e of the warp's tile: a thread holds
// two rows of each m-tile, and the four lanes of a quad share them.
template <int m_tiles_, int cols_>
struct Accumulator {
  static constexpr int m_tiles = m_tiles_, cols = cols_, n_tiles = cols_ / 8;
  static_assert(cols % 16 == 0, "column tiles go in pairs of 8");

  float x[m_tiles][n_tiles][4];

  void zero() {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int j = 0; j < n_tiles; ++j) x[t][j][0] = x[t][j][1] = x[t][j][2] = x[t][j][3] = 0.0f;
    }
  }

  void add(const Accumulator& other) {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int j = 0; j < n_tiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[t][j][i] += other.x[t][j][i];
      }
    }
  }
};

inline u32 lane() { return ptx::laneid(); }

// The rows and columns of the warp's tile that this thread holds.
template <int m_tile_rows = 16>
inline int fragment_row(int t, int i) {
  return m_tile_rows * t + lane() / 4 + 8 * i;
}

inline int fragment_col() { return 2 * (lane() % 4); }

// Calls step(t, i, j) for every pair of entries x[t][j][2 * i] and x[t][j][2 * i + 1] of an accumulator, which are
// neighbours in a row.
template <int m_tiles, int cols, class Step>
inline void for_each_pair(Step&& step) {
#pragma unroll
  for (int j = 0; j < cols / 8; ++j) {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) step(t, i, j);
    }
  }
}

// A warp's 16 rows of an accumulator as the A operand of mma.m16n8k16 and wgmma: x[s] is columns 16 s to 16 s + 15.
template <int cols>
struct Operand {
  u32 x[cols / 16][4];
};

template <>
struct Operand<0> {
  u32 x[1][4];  // unused: an array must have an element
};

// The first `steps` steps of `to` ← those of `from`.
template <int steps, int cols>
inline void copy_steps(Operand<cols>& to, const Operand<cols>& from) {
#pragma unroll
  for (int s = 0; s < steps; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to.x[s][i] = from.x[s][i];
  }
}

// operand ← an accumulator, two neighbouring n-tiles of which are, packed, the A operand of one step.
template <class element, int cols>
inline void pack(Operand<cols>& operand, const Accumulator<1, cols>& from) {
#pragma unroll
  for (int s = 0; s < cols / 16; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const pair = &from.x[0][2 * s + i / 2][2 * (i % 2)];
      operand.x[s][i] = ptx::cvt_rn_x2<element>(pair[0], pair[1]);
    }
  }
}

// The same, but in the first `steps` steps only for those of the thread's two rows that are `chosen`.
template <class element, int steps, int cols>
inline void pack_rows(Operand<cols>& operand, const Accumulator<1, cols>& from, const bool (&chosen)[2]) {
  Operand<cols> packed;
  pack<element>(packed, from);
#pragma unroll
  for (int s = 0; s < cols / 16; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (s >= steps || chosen[i % 2]) operand.x[s][i] = packed.x[s][i];
    }
  }
}

}  // namespace tile

namespace warp {

// Maximum, disjunction and sum over the four lanes that share a row.
inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

inline bool quad_any(bool condition) {
  const u32 lanes = __ballot_sync(0xffffffffu, condition);
  return (lanes >> (tile::lane() & ~3u) & 15u) != 0;
}

inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Transposes x over a quad: lane q gives its x[t] to lane t, where it becomes x[q].
inline void quad_transpose(u32 (&x)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; ++step) {
    const bool upper = tile::lane() & step;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      u32& low = x[step == 1 ? 2 * i : i];
      u32& high = x[step == 1 ? 2 * i + 1 : i + 2];
      const u32 received = __shfl_xor_sync(0xffffffffu, upper ? low : high, step);
      (upper ? low : high) = received;
    }
  }
}

// A lane has one word of a row of each of two neighbouring n-tiles. Lanes trade, so that each has two neighbouring
// words, which are chunk `traded_chunk` of the four 8-byte chunks of that row. A quad then stores 32 bytes side by
// side.
inline uint2 trade(u32 first, u32 second) {
  const bool odd = tile::lane() % 2;
  const u32 received = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
  return {odd ? received : first, odd ? second : received};
}

inline int traded_chunk() { return tile::lane() % 2 * 2 + tile::lane() / 2 % 2; }

}  // namespace warp
