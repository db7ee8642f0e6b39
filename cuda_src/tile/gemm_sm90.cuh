// tile: a warpgroup's matrix products with wgmma, from shared tiles. They run asynchronously, and each call is a group:
// its operands may be touched again after a `wait` for it.
#pragma once

#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/shared.cuh"
#include "ptx/wgmma.cuh"
#include "tile/accumulator.cuh"
#include "tile/shared.cuh"

namespace tile {

// The descriptor of a tile for wgmma (PTX ISA, "Matrix Descriptor Format"): address, leading and stride byte offsets in
// units of 16 bytes, and the swizzle.
template <class Tile>
inline u64 descriptor(u32 address, u32 leading_bytes) {
  constexpr u64 swizzle = Tile::panel_bytes == 128 ? 1 : 2;
  constexpr u64 stride_bytes = 8 * Tile::panel_bytes;  // from 8 rows to the next 8
  return u64((address & 0x3ffff) >> 4) | u64(leading_bytes >> 4) << 16 | (stride_bytes >> 4) << 32 | swizzle << 62;
}

}  // namespace tile

namespace warpgroup {

template <int cols>
inline void hold(tile::Accumulator<1, cols>& x) {
#pragma unroll
  for (int j = 0; j < cols / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::hold(x.x[0][j][i]);
  }
}

template <int cols>
inline void hold(tile::Operand<cols>& x) {
#pragma unroll
  for (int s = 0; s < cols / 16; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::hold(x.x[s][i]);
  }
}

// Waits until at most `pending` products are running; the registers of the others are `ready`.
template <int pending, class... Registers>
inline void wait(Registers&... ready) {
  ptx::wgmma_wait_group<pending>();
  (hold(ready), ...);
}

// Loads the first columns of 64 rows of q from first_row on, for gemm_abt to hold.
template <int cols, class Q>
inline void load_operand(tile::Operand<cols>& operand, const Q& q, int first_row) {
  const u32 lane = tile::lane();
  const u32 address = q.address(first_row + int(threadIdx.x / 32 % 4) * 16 + lane % 16, lane / 16);
#pragma unroll
  for (int step = 0; step < cols / 16; ++step) ptx::ldmatrix_x4(operand.x[step], Q::step_chunks(address, step));
}

// scores = q·kᵀ along `depth` columns, for 64 rows of q from first_row on and all rows of k. Columns of q that `held`
// holds are not read from shared memory.
template <int depth, int held_cols, class Q, class K>
inline void gemm_abt(tile::Accumulator<1, K::rows>& scores, const tile::Operand<held_cols>& held, const Q& q,
                     const K& k, int first_row) {
  static_assert(Q::rows % 64 == 0, "a warpgroup multiplies 64 rows");
  constexpr int panel_steps = K::panel_bytes / 32;
  const u64 a = tile::descriptor<Q>(q.base + first_row * Q::panel_bytes, 16), b = tile::descriptor<K>(k.base, 16);
  hold(scores);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < ceil_div(depth, 16); ++step) {
    const int panel = step / panel_steps, within = step % panel_steps * 32;
    const u64 b_step = b + ((panel * K::panel_stride + within) >> 4);
    if (step < held_cols / 16)
      ptx::wgmma_rs<typename K::element, false>(scores.x[0], held.x[step], b_step, step > 0);
    else
      ptx::wgmma_ss<typename K::element, false>(scores.x[0], a + ((panel * Q::panel_stride + within) >> 4), b_step,
                                                step > 0);
  }
  ptx::wgmma_commit_group();
}

template <int depth, class Q, class K>
inline void gemm_abt(tile::Accumulator<1, K::rows>& scores, const Q& q, const K& k, int first_row = 0) {
  gemm_abt<depth>(scores, tile::Operand<0>{}, q, k, first_row);
}

// out = aᵀ·b along all rows of both, for 64 columns of a from first_row on, where a panel begins, and out_cols columns
// of b from first_col on, where a panel or half of one begins.
template <class A, class B, int out_cols>
inline void gemm_atb(tile::Accumulator<1, out_cols>& out, const A& a, const B& b, int first_row, int first_col) {
  static_assert(A::rows == B::rows && A::panel_bytes == 128, "a panel holds the 64 columns");
  const u64 from_a = tile::descriptor<A>(a.base + A::step_cols(first_row), A::panel_stride);
  constexpr int panel_cols = B::panel_bytes / sizeof(typename B::element);
  static_assert(out_cols <= panel_cols / 2 || out_cols % panel_cols == 0, "whole panels, or a part of one");
  const u32 within = first_col % panel_cols * sizeof(typename B::element);
  const u64 from_b = tile::descriptor<B>(b.base + B::step_cols(first_col) + within, B::panel_stride);
  hold(out);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < A::rows / 16; ++step) {
    ptx::wgmma_ss<typename B::element, true>(out.x[0], from_a + ((step * 16 * A::panel_bytes) >> 4),
                                             from_b + ((step * 16 * B::panel_bytes) >> 4), step > 0);
  }
  ptx::wgmma_commit_group();
}

// out = p·v, or out += p·v if `accumulate`.
template <class V, int out_cols>
inline void gemm_ab(tile::Accumulator<1, out_cols>& out, tile::Operand<V::rows>& p, const V& v, bool accumulate) {
  const u64 b = tile::descriptor<V>(v.base, V::panel_stride);
  hold(p);
  hold(out);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < V::rows / 16; ++step) {
    ptx::wgmma_rs<typename V::element, true>(out.x[0], p.x[step], b + ((step * 16 * V::panel_bytes) >> 4),
                                             step > 0 || accumulate);
  }
  ptx::wgmma_commit_group();
}

}  // namespace warpgroup
