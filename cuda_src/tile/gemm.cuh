// tile: a warp's matrix products from shared memory with mma.sync. A step is one mma.m16n8k16 for 16-bit elements; for
// float32 it is three mma.m16n8k8 on tf32 pieces (x = high + low), which recover float32 accuracy.
//
// The tensor cores round sums toward zero, so a long chain of accumulations in them drifts. For float32 only short
// chains run in them; their results are added outside, rounding to nearest. Ootomo and Yokota, "Recovering single
// precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance", 2022.
#pragma once

#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "tile/accumulator.cuh"
#include "tile/shared.cuh"

namespace tile {

// A float32 register fragment as the sum of two tf32 fragments. The tensor cores read the upper 19 bits of a tf32
// operand. `high` is rounded to 19 bits, ties away from zero. It never is infinite: rounding would make infinity of the
// largest numbers, and infinity less infinity is NaN; so the largest numbers, infinity and NaN leave what is beyond the
// largest tf32 to `low`. The tensor cores truncate `low`, for which a factor makes up on average.
//
// With `small` no finite number is near the largest. Numbers may be infinite; products with those become NaN.
template <int n, bool small = false>
struct SplitTf32 {
  u32 high[n], low[n];

  explicit SplitTf32(const u32 (&bits)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      constexpr u32 mask = 0xffffe000, half = 0x1000;
      constexpr float largest = __builtin_bit_cast(float, 0x7f7fe000), truncated = 1.0f + 0.34f / 1024;
      float rounded = __uint_as_float((bits[i] + half) & mask);
      if (!small) rounded = fminf(fmaxf(rounded, -largest), largest);
      high[i] = __float_as_uint(rounded);
      low[i] = __float_as_uint((__uint_as_float(bits[i]) - rounded) * truncated);
    }
  }
};

// d += A·B, the smallest products first; low·low, 2^-22 of the whole, is left out. With `small_a` no finite
// number of A is near the largest.
template <bool small_a = false>
inline void mma_3xtf32(float (&d)[4], const u32 (&a_bits)[4], const u32 (&b_bits)[2]) {
  const SplitTf32<4, small_a> a(a_bits);
  const SplitTf32<2> b(b_bits);
  ptx::mma_m16n8k8_tf32(d, a.low, b.high[0], b.high[1]);
  ptx::mma_m16n8k8_tf32(d, a.high, b.low[0], b.low[1]);
  ptx::mma_m16n8k8_tf32(d, a.high, b.high[0], b.high[1]);
}

// The most steps of 8 that float32 products are summed over within the tensor cores.
inline constexpr int tf32_chain = 4;

}  // namespace tile

namespace warp {

// Loads the first columns of 16 rows of a tile from `row` on, for gemm_abt to hold.
template <int cols, class Tile>
inline void load_operand(tile::Operand<cols>& operand, const Tile& from, int row) {
  const u32 lane = tile::lane();
  const u32 address = from.address(row + lane % 16, lane / 16);
#pragma unroll
  for (int step = 0; step < cols / 16; ++step) ptx::ldmatrix_x4(operand.x[step], Tile::step_chunks(address, step));
}

// sums += A·Bᵀ over `steps` steps, with A = 16 m_tiles rows of q and B = all rows of k, from addresses q_lane and
// k_lane on. A step reads 32 bytes of each row, 16 elements of 16 bits or 8 of float32, which ldmatrix reads alike; the
// first steps of A may be `held`. beside() is called when the products of the first step have been issued.
template <int steps, class Q, class K, int m_tiles, int block_n, int held_cols, class Beside>
inline void gemm_abt_steps(tile::Accumulator<m_tiles, block_n>& sums, const tile::Operand<held_cols>& held, u32 q_lane,
                           u32 k_lane, Beside&& beside) {
  static_assert(held_cols == 0 || m_tiles == 1, "the rows of one m-tile are held");
  using element = typename Q::element;
#pragma unroll
  for (int step = 0; step < steps; ++step) {
    u32 a[m_tiles][4];
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
      if (step < held_cols / 16) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[t][i] = held.x[step][i];
      } else {
        ptx::ldmatrix_x4(a[t], Q::step_chunks(q_lane, step) + Q::step_rows(16 * t));
      }
    }
#pragma unroll
    for (int j = 0; j < block_n / 8; j += 2) {
      u32 b[4];
      ptx::ldmatrix_x4(b, K::step_chunks(k_lane, step) + K::step_rows(8 * j));
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if constexpr (is_same<element, f32>) {
            tile::mma_3xtf32(sums.x[t][j + h], a[t], {b[2 * h], b[2 * h + 1]});
          } else {
            ptx::mma_m16n8k16<element>(sums.x[t][j + h], a[t], b[2 * h], b[2 * h + 1]);
          }
        }
      }
    }
    if (step == 0) beside();
  }
}

// scores = a·bᵀ along `depth` columns, for 16 m_tiles rows of a from a_row on and `cols` rows of b from b_row on. The
// columns of a that `held` holds are not read. beside() is called once, beside the first products: copies that are
// issued there delay none. Before them, if the loop is rolled.
template <int depth, int m_tiles, int cols, class element, int a_rows, int b_rows, int width, int held_cols,
          class Beside>
inline void gemm_abt(tile::Accumulator<m_tiles, cols>& scores, const tile::Operand<held_cols>& held,
                     const tile::SharedTile<element, a_rows, width>& a,
                     const tile::SharedTile<element, b_rows, width>& b, int a_row, int b_row, Beside&& beside) {
  using A = tile::SharedTile<element, a_rows, width>;
  using B = tile::SharedTile<element, b_rows, width>;
  const u32 lane = tile::lane();
  const u32 a_lane = a.address(a_row + lane % 16, lane / 16);
  const u32 b_lane = b.address(b_row + lane % 8 + (lane / 16) * 8, (lane / 8) % 2);
  scores.zero();
  if constexpr (is_same<element, f32>) {
    static_assert(A::panel_bytes == 128, "the chain of products is one panel");
    static_assert(held_cols == 0, "float32 is split anew at every step");
    beside();
#pragma unroll 1  // unrolled, the compiler loads far ahead and spills
    for (int panel = 0; panel < A::panels; ++panel) {
      tile::Accumulator<m_tiles, cols> sums;
      sums.zero();
      gemm_abt_steps<tile::tf32_chain, A, B>(sums, held, a_lane + panel * A::panel_stride,
                                             b_lane + panel * B::panel_stride, [] {});
      scores.add(sums);
    }
  } else {
    gemm_abt_steps<ceil_div(depth, 16), A, B>(scores, held, a_lane, b_lane, beside);
  }
}

template <int depth, int m_tiles, int cols, class element, int a_rows, int b_rows, int width>
inline void gemm_abt(tile::Accumulator<m_tiles, cols>& scores, const tile::SharedTile<element, a_rows, width>& a,
                     const tile::SharedTile<element, b_rows, width>& b, int a_row, int b_row) {
  gemm_abt<depth>(scores, tile::Operand<0>{}, a, b, a_row, b_row, [] {});
}

// The same for all rows of k.
template <int depth, int m_tiles, int block_n, class element, int block_m, int width>
inline void gemm_abt(tile::Accumulator<m_tiles, block_n>& scores, const tile::SharedTile<element, block_m, width>& q,
                     const tile::SharedTile<element, block_n, width>& k, int first_row) {
  gemm_abt<depth>(scores, q, k, first_row, 0);
}

// out += P·V for 16-bit elements, V from column first_col on, where a panel begins. Two neighbouring n-tiles of an
// accumulator are, packed, the A operand of one step, so P never leaves its registers; V's columns come through
// ldmatrix.trans. prepare(step) makes the columns of p for a step, beside the products of the step before.
template <int m_tiles, int block_n, int out_cols, class element, int width, class Prepare>
inline void gemm_ab(tile::Accumulator<m_tiles, out_cols>& out, const tile::Accumulator<m_tiles, block_n>& p,
                    const tile::SharedTile<element, block_n, width>& v, int first_col, Prepare&& prepare) {
  using V = tile::SharedTile<element, block_n, width>;
  const u32 lane = tile::lane();
  const u32 v_lane = v.address(lane % 16, lane / 16) + V::step_cols(first_col);
  prepare(0);
#pragma unroll
  for (int step = 0; step < block_n / 16; ++step) {
    u32 a[m_tiles][4];
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const pair = &p.x[t][2 * step + i / 2][2 * (i % 2)];
        a[t][i] = ptx::cvt_rn_x2<element>(pair[0], pair[1]);
      }
    }
    if (step + 1 < block_n / 16) prepare(step + 1);
#pragma unroll
    for (int j = 0; j < out_cols / 8; j += 2) {
      u32 b[4];
      ptx::ldmatrix_x4_trans(b, V::step_chunks(v_lane, j / 2) + V::step_rows(16 * step));
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) {
        ptx::mma_m16n8k16<element>(out.x[t][j], a[t], b[0], b[1]);
        ptx::mma_m16n8k16<element>(out.x[t][j + 1], a[t], b[2], b[3]);
      }
    }
  }
}

template <int m_tiles, int block_n, int out_cols, class element, int width>
inline void gemm_ab(tile::Accumulator<m_tiles, out_cols>& out, const tile::Accumulator<m_tiles, block_n>& p,
                    const tile::SharedTile<element, block_n, width>& v, int first_col) {
  gemm_ab(out, p, v, first_col, [](int) {});
}

// The same for float32. The keys of a step are taken in the order 0, 2, 4, 6, 1, 3, 5, 7: then an
// accumulator tile of P is the A operand as it stands, and the four lanes of a quad read V's rows from different banks.
template <int m_tiles, int block_n, int out_cols, int width>
inline void gemm_ab(tile::Accumulator<m_tiles, out_cols>& out, const tile::Accumulator<m_tiles, block_n>& p,
                    const tile::SharedTile<f32, block_n, width>& v, int first_col) {
  using V = tile::SharedTile<f32, block_n, width>;
  const u32 g = tile::lane() / 4, q = tile::lane() % 4;
  const u32 even = v.address(2 * q, g / 4) + (g % 4) * 4 + V::step_cols(first_col);
  const u32 odd = v.address(2 * q + 1, g / 4) + (g % 4) * 4 + V::step_cols(first_col);
#pragma unroll
  for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
    for (int j = 0; j < out_cols / 8; ++j) {
#pragma unroll
      for (int first_step = 0; first_step < block_n / 8; first_step += tile::tf32_chain) {
        float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int step = first_step; step < min_of(block_n / 8, first_step + tile::tf32_chain); ++step) {
          const float (&c)[4] = p.x[t][step];
          tile::mma_3xtf32<true>(
              sums, {__float_as_uint(c[0]), __float_as_uint(c[2]), __float_as_uint(c[1]), __float_as_uint(c[3])},
              {ptx::ld_shared_u32(V::step_chunks(even, j) + V::step_rows(8 * step)),
               ptx::ld_shared_u32(V::step_chunks(odd, j) + V::step_rows(8 * step))});
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) out.x[t][j][i] += sums[i];
      }
    }
  }
}

// A lane's address in each of the 32-byte steps of `cols` columns of a tile from first_col on. Where the columns cover
// whole panels or stay within one, first_col goes into the first address, and the steps are known at compile time.
template <class Tile, int cols>
struct ColumnSteps {
  static constexpr int panel_cols = Tile::panel_chunks * Tile::chunk_elements;
  static constexpr bool ahead = cols % panel_cols == 0 || panel_cols % cols == 0;
  u32 from;
  int first;

  // `address` is the lane's in the first 32 bytes of a row.
  ColumnSteps(u32 address, int first_col)
      : from(ahead ? Tile::step_chunks(address, first_col * int(sizeof(typename Tile::element)) / 32) : address),
        first(ahead ? 0 : first_col * int(sizeof(typename Tile::element)) / 32) {}

  u32 at(int step) const { return Tile::step_chunks(from, first + step); }
};

// How the rows of a product's A operand lie in its shared tile.
enum class Rows { along_rows, along_columns };

// out += A·B over all rows of b, for 16 m_tiles rows of A from first_row on and `cols` columns of b from first_col on,
// both multiples of 16. A is the tile a, or its transpose, whose fragments ldmatrix.trans reads.
template <Rows rows, int m_tiles, int cols, class A, class B>
inline void gemm_shared(tile::Accumulator<m_tiles, cols>& out, const A& a, const B& b, int first_row, int first_col) {
  using element = typename A::element;
  constexpr bool transposed = rows == Rows::along_columns;
  static_assert((transposed ? A::rows : A::cols) == B::rows, "the tiles must agree on the depth");
  const u32 lane = tile::lane();
  const u32 a_lane = transposed ? a.address(lane % 8 + (lane / 16) * 8, first_row / 8 + (lane / 8) % 2)
                                : a.address(first_row + lane % 16, lane / 16);
  const ColumnSteps<B, cols> b_lane(b.address(lane % 16, lane / 16), first_col);
#pragma unroll
  for (int step = 0; step < B::rows / 16; ++step) {
    u32 x[m_tiles][4];
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
      if constexpr (transposed) {
        ptx::ldmatrix_x4_trans(x[t], A::step_chunks(a_lane, t) + A::step_rows(16 * step));
      } else {
        ptx::ldmatrix_x4(x[t], A::step_chunks(a_lane, step) + A::step_rows(16 * t));
      }
    }
#pragma unroll
    for (int j = 0; j < cols / 8; j += 2) {
      u32 y[4];
      ptx::ldmatrix_x4_trans(y, b_lane.at(j / 2) + B::step_rows(16 * step));
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) {
        ptx::mma_m16n8k16<element>(out.x[t][j], x[t], y[0], y[1]);
        ptx::mma_m16n8k16<element>(out.x[t][j + 1], x[t], y[2], y[3]);
      }
    }
  }
}

// The same for float32, with the depth of a step in the order 0, 2, 4, 6, 1, 3, 5, 7, as for P·V.
template <Rows rows, int m_tiles, int cols, int a_rows, int a_cols, int b_rows, int b_cols>
inline void gemm_shared(tile::Accumulator<m_tiles, cols>& out, const tile::SharedTile<f32, a_rows, a_cols>& a,
                        const tile::SharedTile<f32, b_rows, b_cols>& b, int first_row, int first_col) {
  using A = tile::SharedTile<f32, a_rows, a_cols>;
  using B = tile::SharedTile<f32, b_rows, b_cols>;
  constexpr bool transposed = rows == Rows::along_columns;
  static_assert((transposed ? a_rows : a_cols) == b_rows, "the tiles must agree on the depth");
  constexpr int steps = min_of(tile::tf32_chain, b_rows / 8);
  static_assert(b_rows / 8 % steps == 0, "the depth must be whole chains");
  const u32 g = tile::lane() / 4, q = tile::lane() % 4;
  const u32 a_even = transposed ? a.address(2 * q, g / 4) + (g % 4) * 4 : a.address(first_row + g, q / 2) + (q % 2) * 8;
  const u32 a_odd = a.address(2 * q + 1, g / 4) + (g % 4) * 4;
  const ColumnSteps<B, cols> b_even(b.address(2 * q, g / 4) + (g % 4) * 4, first_col);
  const ColumnSteps<B, cols> b_odd(b.address(2 * q + 1, g / 4) + (g % 4) * 4, first_col);
#pragma unroll 1
  for (int first_step = 0; first_step < b_rows / 8; first_step += steps) {
    u32 x[m_tiles][steps][4];
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int step = 0; step < steps; ++step) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if constexpr (transposed) {
            const int chunks = first_row / 8 + 2 * t + i, down = A::step_rows(8 * (first_step + step));
            x[t][step][i] = ptx::ld_shared_u32(A::step_chunks(a_even, chunks) + down);
            x[t][step][i + 2] = ptx::ld_shared_u32(A::step_chunks(a_odd, chunks) + down);
          } else {
            const uint2 pair =
                ptx::ld_shared_v2(A::step_chunks(a_even, first_step + step) + A::step_rows(16 * t + 8 * i));
            x[t][step][i] = pair.x;
            x[t][step][i + 2] = pair.y;
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < cols / 8; ++j) {
      float sums[m_tiles][4] = {};
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        const int down = B::step_rows(8 * (first_step + step));
        const u32 y[2] = {ptx::ld_shared_u32(b_even.at(j) + down), ptx::ld_shared_u32(b_odd.at(j) + down)};
#pragma unroll
        for (int t = 0; t < m_tiles; ++t) tile::mma_3xtf32(sums[t], x[t][step], y);
      }
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out.x[t][j][i] += sums[t][i];
      }
    }
  }
}

// out += a·b and out += aᵀ·b, with the rows and columns of `gemm_shared`.
template <int m_tiles, int cols, class A, class B>
inline void gemm_ab(tile::Accumulator<m_tiles, cols>& out, const A& a, const B& b, int first_row, int first_col) {
  gemm_shared<Rows::along_rows>(out, a, b, first_row, first_col);
}

template <int m_tiles, int cols, class A, class B>
inline void gemm_atb(tile::Accumulator<m_tiles, cols>& out, const A& a, const B& b, int first_row, int first_col) {
  gemm_shared<Rows::along_columns>(out, a, b, first_row, first_col);
}

}  // namespace warp
