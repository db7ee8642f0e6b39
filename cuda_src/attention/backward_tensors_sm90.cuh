// attention: what the backward's main loops for sm_90 share: loading tiles, and the arithmetic between their products.
#pragma once

#include "attention/backward_mask.cuh"
#include "attention/backward_params.cuh"
#include "attention/backward_rows.cuh"
#include "attention/backward_work.cuh"
#include "attention/row_source.cuh"
#include "attention/variant.cuh"
#include "core/math.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "tile/accumulator.cuh"
#include "tile/pipeline.cuh"
#include "tile/tensor_sm90.cuh"

namespace attention {

// What one of the two loaders loads: Q, K and row_lse, for scores, or dout, V and row_delta, for their gradients.
enum class Side { scores, gradients };

// Used by one thread: loads one side of the work's block of keys, and of every tile of queries that sees the block,
// into the stages of a main loop.
template <class Config, class Loop, Side side>
struct TileLoader {
  const Loop& loop;
  const BackwardArgument& argument;
  tile::CursorPair<Loop::Ring::stages> progress;  // the tile of queries, and the block of keys

  void load(const BackwardWork<Config>& work) {
    const BackwardParams& backward = argument.params;
    if (work.tiles.empty()) return;
    if constexpr (side == Side::scores)
      load_keys(loop.keys(), loop.k(), argument.k, work);
    else
      load_keys(loop.values(), loop.v(), argument.v, work);
    const auto& at = progress.first;
    for_each_query_tile<Config::chains>(backward.forward, work, [&](int head, int position) {
      const int m_block = work.tiles.block(position);
      const i64 row = workspace_row<Config>(backward, work, head) + m_block * Config::block_m;
      if constexpr (side == Side::scores)
        load_queries(loop.queries(), loop.q(at.stage()), argument.q, loop.lse(at.stage()), backward.row_lse + row, work,
                     head, m_block);
      else
        load_queries(loop.gradients(), loop.dout(at.stage()), argument.dout, loop.delta(at.stage()),
                     backward.row_delta + row, work, head, m_block);
    });
  }

 private:
  template <class Tile>
  void load_keys(const typename Loop::KeyRing& ring, const Tile& to, const ptx::TensorMap& map,
                 const BackwardWork<Config>& work) {
    ring.wait_empty(progress.second());
    ring.expect(progress.second(), Tile::bytes);
    load_rows<Config>(to, map, ring.full(0), work.n_block * Config::block_n, work.keys());
    progress.advance_second();
  }

  template <class Tile>
  void load_queries(const typename Loop::Ring& ring, const Tile& to, const ptx::TensorMap& map, u32 to_numbers,
                    const float* numbers, const BackwardWork<Config>& work, int head, int m_block) {
    typename Loop::Ring::Cursor& at = progress.first;
    ring.wait_empty(at);
    ring.expect(at, Tile::bytes + Loop::rows_bytes);
    load_rows<Config>(to, map, ring.full(at.stage()), m_block * Config::block_m, work.queries(head));
    int own = Loop::rows_bytes;  // bytes that are the sequence's own; another's may follow in memory
    if (Config::varlen) {
      own = min_of(own, round_up(work.seqlen.q - m_block * Config::block_m, aligned_rows) * int(sizeof(float)));
      const float* const padding = side == Side::scores ? argument.params.row_lse : argument.params.row_delta;
      if (own < Loop::rows_bytes) {
        ptx::cp_async_bulk(to_numbers + own, padding - Config::block_m, Loop::rows_bytes - own, ring.full(at.stage()));
      }
    }
    ptx::cp_async_bulk(to_numbers, numbers, own, ring.full(at.stage()));
    at.advance();
  }
};

// The lse or delta of the query of each column of transposed scores that a thread holds. These numbers are loaded ahead
// of products, since any access to shared memory after a product waits until the tensor cores have begun the product.
template <int cols>
struct ColumnNumbers {
  static constexpr int pairs = cols / 8;
  float2 x[pairs];

  // Loads pairs [first, last) of this thread's; the tile's numbers lie at shared address `numbers`.
  void load(u32 numbers, int first = 0, int last = pairs) {
    const u32 address = numbers + tile::fragment_col() * sizeof(float);
#pragma unroll
    for (int j = first; j < last; ++j) x[j] = ptx::ld_shared_f32x2(address + 8 * j * sizeof(float));
  }
};

// p ← the probabilities of transposed scores s; ds_factors ← the same times the derivatives of the variant's scores,
// unless the variant is empty. In a `boundary` tile not every query sees every key.
template <class Config, int block_m>
inline void probabilities(tile::Operand<block_m>& p, tile::Operand<block_m>& ds_factors,
                          tile::Accumulator<1, block_m>& s, const ColumnNumbers<block_m>& lse, const Params& params,
                          const BackwardWork<Config>& work, int head, int first_key, int m_block, bool boundary) {
  using Variant = typename Config::variant;
  using element = typename Config::element;
  const Variant variant(params, work.batch, head);
  const float scale = exponent_scale<Variant>(params);
  const int first_query = m_block * block_m, thread_query = first_query + tile::fragment_col();
  const int keys[2] = {first_key + tile::fragment_row(0, 0), first_key + tile::fragment_row(0, 1)};
  const QuerySpan<Config> spans[2] = {{params, work.seqlen, keys[0], thread_query},
                                      {params, work.seqlen, keys[1], thread_query}};
  if (Variant::empty && unlikely(boundary)) mask_transposed<Config>(s, params, work.seqlen, first_key, first_query);
#pragma unroll
  for (int j = 0; j < block_m / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float x[2], derivative[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int query = 8 * j + e;
        x[e] = s.x[0][j][2 * i + e];
        derivative[e] = 1.0f;
        // A variant's derivatives need the registers that a whole tile of its scores would take, so the variant, and
        // with it the mask, is applied score by score.
        if constexpr (!Variant::empty) {
          const float distance = float(thread_query + work.seqlen.diagonal() - keys[i]);
          const Point at{work.batch, head, thread_query + query, keys[i], distance + float(query)};
          x[e] = variant.score(x[e] * params.softmax_scale, at, derivative[e]);
          if (!spans[i].sees(query)) x[e] = -infinity;
        }
        x[e] = ptx::ex2_approx_ftz(fmaf(x[e], scale, e == 0 ? -lse.x[j].x : -lse.x[j].y));
      }
      p.x[j / 2][2 * (j % 2) + i] = ptx::cvt_rn_x2<element>(x[0], x[1]);
      if constexpr (!Variant::empty) {
        ds_factors.x[j / 2][2 * (j % 2) + i] = ptx::cvt_rn_x2<element>(x[0] * derivative[0], x[1] * derivative[1]);
      }
    }
  }
}

// ds ← ds_factors · (dp - delta).
template <class Config, int block_m>
inline void gradients_of_scores(tile::Operand<block_m>& ds, const tile::Operand<block_m>& ds_factors,
                                const tile::Accumulator<1, block_m>& dp, const ColumnNumbers<block_m>& delta) {
  using element = typename Config::element;
#pragma unroll
  for (int j = 0; j < block_m / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 factor = ptx::cvt_f32_x2<element>(ds_factors.x[j / 2][2 * (j % 2) + i]);
      const float low = factor.x * (dp.x[0][j][2 * i] - delta.x[j].x);
      const float high = factor.y * (dp.x[0][j][2 * i + 1] - delta.x[j].y);
      ds.x[j / 2][2 * (j % 2) + i] = ptx::cvt_rn_x2<element>(low, high);
    }
  }
}

// dk or dv ← factor · a warpgroup's accumulator, whose rows are keys; the warp's first is first_key. Rows past the live
// length get zeros, whatever dout holds.
template <class Config, bool of_values, int cols>
inline void write_keys(const BackwardParams& backward, const BackwardWork<Config>& work,
                       const tile::Accumulator<1, cols>& from, int first_key) {
  constexpr int valid_cols = of_values ? Config::head_dim_v : Config::head_dim;
  const float factor = of_values ? 1.0f : backward.forward.softmax_scale;
  const Strides& strides = of_values ? backward.dv_strides : backward.dk_strides;
  void* const gradient = of_values ? backward.dv : backward.dk;
  NotFinite<f32> not_finite;
  typename Config::element* const rows = static_cast<typename Config::element*>(gradient) + work.batch * strides.batch +
                                         work.head * strides.head + i64(work.seqlen.k_first_row) * strides.seqlen;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_key + tile::fragment_row(0, i);
    write_row<Config::store_bytes, valid_cols>(rows + row * strides.seqlen, strides.dim, row < work.key_rows, from, 0,
                                               i, row < work.seqlen.k ? factor : 0.0f, not_finite);
  }
  if (unlikely(not_finite.found())) *backward.not_finite = 1;
}

}  // namespace attention
