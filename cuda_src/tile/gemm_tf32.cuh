// tile: a warp's matrix products of float32 from shared memory. A step is three mma.m16n8k8 on tf32 pieces
// (x = high + low), which recover float32 accuracy.
//
// The tensor cores round sums toward zero, so a long chain of accumulations in them drifts. Only short chains run in
// them; their results are added outside, rounding to nearest. Ootomo and Yokota, "Recovering single precision accuracy
// from Tensor Cores while surpassing the FP32 theoretical peak performance", 2022.
#pragma once

#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "tile/accumulator.cuh"
#include "tile/column_steps.cuh"
#include "tile/shared.cuh"

namespace tile {

// How float32 numbers are split. `plain` takes fewer instructions, and makes NaN of infinity and of the largest
// numbers, so of sums of products with them; `bounded` does not.
enum class Splitting { plain, bounded };

// A float32 register fragment as the sum of two tf32 fragments. The tensor cores read the upper 19 bits of a tf32
// operand. `high` is rounded to 19 bits. Rounding makes infinity of the largest numbers, and infinity less infinity is
// NaN; `bounded`, the largest numbers, infinity and NaN leave what is beyond the largest tf32 to `low`. The tensor
// cores truncate `low`, which has either sign, so that it does not bias sums.
template <int n>
struct SplitTf32 {
  u32 high[n], low[n];

  template <Splitting splitting = Splitting::plain>
  void set(const u32 (&bits)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float rounded = round<splitting>(bits[i]);
      high[i] = __float_as_uint(rounded);
      low[i] = __float_as_uint(__uint_as_float(bits[i]) - rounded);
    }
  }

 private:
  template <Splitting splitting>
  static float round(u32 bits) {
    constexpr u32 mask = 0xffffe000, half = 0x1000;
    constexpr float largest = __builtin_bit_cast(float, 0x7f7fe000);
    const float rounded = __uint_as_float((bits + half) & mask);
    return splitting == Splitting::plain ? rounded : fminf(fmaxf(rounded, -largest), largest);
  }
};

// The most steps of 8 that float32 products are summed over within the tensor cores. Of the three products of a step
// only the largest is rounded by as much as its sum is large; in chains longer than `tf32_shared` the others have a sum
// of their own, which may then be twice as long, and err by less.
inline constexpr int tf32_chain = 8, tf32_shared = 4;

// Of so many n-tiles, those whose products take turns: each product of a sum waits for the one before it.
inline constexpr int tf32_turns(int n_tiles) { return n_tiles % 4 == 0 ? 4 : n_tiles % 6 == 0 ? 6 : 2; }

// Sums of products within the tensor cores: `large` of those of the high parts, `small` of what those leave. Or there
// is one sum of all, the smallest products of a step first.
template <int m_tiles, int cols, bool apart>
struct SumsTf32 {
  Accumulator<m_tiles, cols> large, small;  // of one sum, `large`

  void zero() {
    large.zero();
    small.zero();
  }

  // += A·B for `turns` neighbouring n-tiles from n-tile `first` on; low·low, 2^-22 of the whole, is left out.
  template <int turns>
  void multiply(int first, const SplitTf32<4> (&a)[m_tiles], const SplitTf32<2> (&b)[turns]) {
    Accumulator<m_tiles, cols>& rest = apart ? small : large;
#pragma unroll
    for (int j = 0; j < turns; ++j) {
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) mma(rest.x[t][first + j], a[t].low, b[j].high);
    }
#pragma unroll
    for (int j = 0; j < turns; ++j) {
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) mma(rest.x[t][first + j], a[t].high, b[j].low);
    }
#pragma unroll
    for (int j = 0; j < turns; ++j) {
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) mma(large.x[t][first + j], a[t].high, b[j].high);
    }
  }

  // The n-tiles of `to` from n-tile `first` on += these.
  template <int to_cols>
  void add_to(Accumulator<m_tiles, to_cols>& to, int first = 0) const {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int j = 0; j < cols / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          to.x[t][first + j][i] += apart ? small.x[t][j][i] + large.x[t][j][i] : large.x[t][j][i];
        }
      }
    }
  }

 private:
  static void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { ptx::mma_m16n8k8_tf32(d, a, b[0], b[1]); }
};

}  // namespace tile

namespace warp {

// sums += A·Bᵀ over `steps` steps, with A = 16 m_tiles rows of q and B = all rows of k, from addresses q_lane and
// k_lane on. A step reads 8 elements of each row: 32 bytes, which ldmatrix reads as those of 16-bit elements.
template <int steps, tile::Splitting splitting, class Q, class K, int m_tiles, int block_n, bool apart>
inline void gemm_abt_steps(tile::SumsTf32<m_tiles, block_n, apart>& sums, u32 q_lane, u32 k_lane) {
  constexpr int turns = tile::tf32_turns(block_n / 8);
#pragma unroll
  for (int step = 0; step < steps; ++step) {
    tile::SplitTf32<4> a[m_tiles];
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
      u32 bits[4];
      ptx::ldmatrix_x4(bits, Q::step_chunks(q_lane, step) + Q::step_rows(16 * t));
      a[t].template set<splitting>(bits);
    }
#pragma unroll
    for (int first = 0; first < block_n / 8; first += turns) {
      tile::SplitTf32<2> b[turns];
#pragma unroll
      for (int j = 0; j < turns; j += 2) {
        u32 bits[4];
        ptx::ldmatrix_x4(bits, K::step_chunks(k_lane, step) + K::step_rows(8 * (first + j)));
        b[j].template set<splitting>({bits[0], bits[1]});
        b[j + 1].template set<splitting>({bits[2], bits[3]});
      }
      sums.multiply(first, a, b);
    }
  }
}

// scores ← A·Bᵀ, in chains of two panels.
template <tile::Splitting splitting, class A, class B, int m_tiles, int cols>
inline void gemm_abt_panels(tile::Accumulator<m_tiles, cols>& scores, u32 a_lane, u32 b_lane) {
  static_assert(A::panel_bytes == 128, "a panel has four steps");
  constexpr int steps = 4, unroll = splitting == tile::Splitting::plain ? 2 : 1;
  scores.zero();
#pragma unroll 1  // unrolled, the compiler loads far ahead and spills
  for (int panel = 0; panel + 2 <= A::panels; panel += 2) {
    tile::SumsTf32<m_tiles, cols, true> sums;
    sums.zero();
#pragma unroll unroll
    for (int i = 0; i < 2; ++i) {
      gemm_abt_steps<steps, splitting, A, B>(sums, a_lane + (panel + i) * A::panel_stride,
                                             b_lane + (panel + i) * B::panel_stride);
    }
    sums.add_to(scores);
  }
  if constexpr (A::panels % 2 != 0) {
    tile::SumsTf32<m_tiles, cols, false> sums;
    sums.zero();
    gemm_abt_steps<steps, splitting, A, B>(sums, a_lane + (A::panels - 1) * A::panel_stride,
                                           b_lane + (A::panels - 1) * B::panel_stride);
    sums.add_to(scores);
  }
}

// Whether a sum may be NaN, on some lane of the warp. Infinite ones and very large ones may look as if they were.
template <int m_tiles, int cols>
inline bool any_nan(const tile::Accumulator<m_tiles, cols>& sums) {
  float seen = 0.0f;
#pragma unroll
  for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
    for (int j = 0; j < cols / 8; ++j) {
      seen = fmaf(sums.x[t][j][0], sums.x[t][j][1], seen);
      seen = fmaf(sums.x[t][j][2], sums.x[t][j][3], seen);
    }
  }
  return __any_sync(0xffffffffu, seen != seen);
}

// out += P·V, V from column first_col on, where a panel begins. The keys of a step are taken in the order 0, 2, 4, 6,
// 1, 3, 5, 7: then an accumulator tile of P is the A operand as it stands, and the four lanes of a quad read V's rows
// from different banks.
template <int m_tiles, int block_n, int out_cols, int width>
inline void gemm_ab(tile::Accumulator<m_tiles, out_cols>& out, const tile::Accumulator<m_tiles, block_n>& p,
                    const tile::SharedTile<f32, block_n, width>& v, int first_col) {
  using V = tile::SharedTile<f32, block_n, width>;
  const u32 g = tile::lane() / 4, q = tile::lane() % 4;
  const u32 even = v.address(2 * q, g / 4) + (g % 4) * 4 + V::step_cols(first_col);
  const u32 odd = v.address(2 * q + 1, g / 4) + (g % 4) * 4 + V::step_cols(first_col);
  constexpr int turns = tile::tf32_turns(out_cols / 8);
#pragma unroll
  for (int first_step = 0; first_step < block_n / 8; first_step += tile::tf32_chain) {
    const int steps = min_of(tile::tf32_chain, block_n / 8 - first_step);
    tile::SplitTf32<4> a[tile::tf32_chain][m_tiles];
#pragma unroll
    for (int step = 0; step < steps; ++step) {
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) {
        const float (&c)[4] = p.x[t][first_step + step];
        a[step][t].set({__float_as_uint(c[0]), __float_as_uint(c[2]), __float_as_uint(c[1]), __float_as_uint(c[3])});
      }
    }
#pragma unroll
    for (int first = 0; first < out_cols / 8; first += turns) {
      tile::SumsTf32<m_tiles, 8 * turns, (block_n / 8 > tile::tf32_shared)> sums;
      sums.zero();
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        const int down = V::step_rows(8 * (first_step + step));
        tile::SplitTf32<2> b[turns];
#pragma unroll
        for (int j = 0; j < turns; ++j) {
          b[j].set({ptx::ld_shared_u32(V::step_chunks(even, first + j) + down),
                    ptx::ld_shared_u32(V::step_chunks(odd, first + j) + down)});
        }
        sums.multiply(0, a[step], b);
      }
      sums.add_to(out, first);
    }
  }
}

// out += A·B as for 16-bit elements, with the depth of a step in the order 0, 2, 4, 6, 1, 3, 5, 7, as for P·V.
template <Rows rows, int m_tiles, int cols, int a_rows, int a_cols, int b_rows, int b_cols>
inline void gemm_shared(tile::Accumulator<m_tiles, cols>& out, const tile::SharedTile<f32, a_rows, a_cols>& a,
                        const tile::SharedTile<f32, b_rows, b_cols>& b, int first_row, int first_col) {
  using A = tile::SharedTile<f32, a_rows, a_cols>;
  using B = tile::SharedTile<f32, b_rows, b_cols>;
  constexpr bool transposed = rows == Rows::along_columns;
  static_assert((transposed ? a_rows : a_cols) == b_rows, "the tiles must agree on the depth");
  constexpr int steps = min_of(tile::tf32_chain, b_rows / 8);
  constexpr int turns = tile::tf32_turns(cols / 8);
  static_assert(b_rows / 8 % steps == 0, "the depth must be whole chains");
  const u32 g = tile::lane() / 4, q = tile::lane() % 4;
  const u32 a_even = transposed ? a.address(2 * q, g / 4) + (g % 4) * 4 : a.address(first_row + g, q / 2) + (q % 2) * 8;
  const u32 a_odd = a.address(2 * q + 1, g / 4) + (g % 4) * 4;
  const ColumnSteps<B, cols> b_even(b.address(2 * q, g / 4) + (g % 4) * 4, first_col);
  const ColumnSteps<B, cols> b_odd(b.address(2 * q + 1, g / 4) + (g % 4) * 4, first_col);
#pragma unroll 1
  for (int first_step = 0; first_step < b_rows / 8; first_step += steps) {
    tile::SplitTf32<4> x[steps][m_tiles];
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        u32 bits[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if constexpr (transposed) {
            const int chunks = first_row / 8 + 2 * t + i, down = A::step_rows(8 * (first_step + step));
            bits[i] = ptx::ld_shared_u32(A::step_chunks(a_even, chunks) + down);
            bits[i + 2] = ptx::ld_shared_u32(A::step_chunks(a_odd, chunks) + down);
          } else {
            const uint2 pair =
                ptx::ld_shared_v2(A::step_chunks(a_even, first_step + step) + A::step_rows(16 * t + 8 * i));
            bits[i] = pair.x;
            bits[i + 2] = pair.y;
          }
        }
        x[step][t].set(bits);
      }
    }
#pragma unroll
    for (int first = 0; first < cols / 8; first += turns) {
      tile::SumsTf32<m_tiles, 8 * turns, (steps > tile::tf32_shared)> sums;
      sums.zero();
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        const int down = B::step_rows(8 * (first_step + step));
        tile::SplitTf32<2> y[turns];
#pragma unroll
        for (int j = 0; j < turns; ++j) {
          y[j].set({ptx::ld_shared_u32(b_even.at(first + j) + down), ptx::ld_shared_u32(b_odd.at(first + j) + down)});
        }
        sums.multiply(0, x[step], y);
      }
      sums.add_to(out, first);
    }
  }
}

}  // namespace warp
