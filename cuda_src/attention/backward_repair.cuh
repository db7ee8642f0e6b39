// attention: the backward's last kernel: rows of gradients that are not finite, computed once more, entry by entry: see
// repair.cuh. In float16 a gradient may also not be finite because dS overflowed on the way. The kernels before say
// whether there is such a row at all; there hardly ever is.
#pragma once

#include "attention/backward_params.cuh"
#include "attention/backward_prepare.cuh"
#include "attention/backward_work.cuh"
#include "attention/block_range.cuh"
#include "attention/masks.cuh"
#include "attention/params.cuh"
#include "attention/repair.cuh"
#include "attention/seqlen.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// Which sequence, and where its rows are.
struct RepairedSequence {
  const Seqlen& seqlen;
  int batch;

  template <class element>
  element* row(element* pointer, const Strides& strides, int head, i64 row) const {
    return pointer + batch * strides.batch + head * strides.head + row * strides.seqlen;
  }
};

// An entry of what dout is multiplied by, which is P unless a term scales it, and the same entry of dS.
struct Entry {
  float weight, ds;
};

// The entry of query `row` and a key, whose rows of q, k, v and dout are given, in lanes of a warp.
template <class Config, class Qk, class V>
inline Entry entry_of(const BackwardParams& backward, const RepairedSequence& sequence, const Qk& q, const Qk& k,
                      const V& v, const V& dout, int query_head, int row, int key, float row_lse, float row_delta) {
  const Params& params = backward.forward;
  const typename Config::variant variant(params, sequence.batch, query_head);
  Derivatives derivatives;
  const Point at{sequence.batch,
                 query_head,
                 row,
                 key,
                 float(row + sequence.seqlen.diagonal() - key),
                 true,
                 sequence.seqlen.diagonal()};
  const float score = variant.score(q.dot(k) * params.softmax_scale, at, derivatives);
  const float p = ptx::ex2_approx_ftz(fmaf(score, log2_e, -row_lse)),
              factor = variant.factor(at) * variant.gain(params.terms);
  const float derivative = derivatives.before * derivatives.after;
  return {p * factor, p * derivative * (factor * dout.dot(v) - row_delta)};
}

// sums += factor · row. True if all of `columns` are NaN, which they then stay.
template <class Columns>
inline bool add_row(Columns& sums, float factor, const Columns& row, u32 columns) {
  bool settled = true;
#pragma unroll
  for (int i = 0; i < Columns::count; ++i) {
    sums.x[i] = fmaf(factor, row.x[i], sums.x[i]);
    settled &= !(columns >> i & 1) || sums.x[i] != sums.x[i];
  }
  return __all_sync(0xffffffffu, settled);
}

// Whether no key has any of a row's probability: then its dout counts as 0, whatever it holds.
inline bool is_without_keys(float row_lse, float row_delta) { return row_lse == infinity && row_delta == row_delta; }

// Called by one warp: repairs rows of dk, or of dv, of keys [first_key, first_key + keys) of the work's sequence, as
// far as they are live.
template <class Config, bool of_values>
inline void repair_keys(const BackwardParams& backward, const BackwardWork<Config>& work, int first_key, int keys) {
  using element = typename Config::element;
  using Qk = LaneColumns<element, Config::head_dim>;
  using V = LaneColumns<element, Config::head_dim_v>;
  using Gradient = LaneColumns<element, of_values ? Config::head_dim_v : Config::head_dim>;
  using Mask = typename Config::mask;
  const Params& params = backward.forward;
  const Seqlen& seqlen = work.seqlen;
  const RepairedSequence sequence{seqlen, work.batch};
  const Strides& strides = of_values ? backward.dv_strides : backward.dk_strides;
  __syncwarp();  // what other lanes have written
#pragma unroll 1
  for (int key = first_key; key < min_of(first_key + keys, seqlen.k); ++key) {
    element* const to = sequence.row(static_cast<element*>(of_values ? backward.dv : backward.dk), strides, work.head,
                                     seqlen.k_first_row + key);
    Gradient sums;
    sums.load(to, strides.dim);
    const u32 columns = sums.not_finite();
    if (!__any_sync(0xffffffffu, columns != 0)) continue;
    sums.clear();
    Qk k;
    V v;
    k.load(sequence.row(static_cast<const element*>(params.k), params.k_strides, work.head, seqlen.k_first_row + key),
           params.k_strides.dim);
    v.load(sequence.row(static_cast<const element*>(params.v), params.v_strides, work.head, seqlen.k_first_row + key),
           params.v_strides.dim);
    const int diagonal_row = key - seqlen.diagonal();
    int first_row = 0, last_row = seqlen.q - 1;
    if constexpr (Mask::hides_last) first_row = Mask::first_query(params, diagonal_row);
    if constexpr (Mask::hides_first) last_row = Mask::last_query(params, diagonal_row);
    bool settled = false;
#pragma unroll 1
    for (int i = 0; i < params.qheads_per_khead && !settled; ++i) {
      const int head = work.head * params.qheads_per_khead + i;
      const i64 rows = workspace_row<Config>(backward, work, head);
#pragma unroll 1
      for (int row = max_of(0, first_row); row <= min_of(last_row, seqlen.q - 1) && !settled; ++row) {
        if constexpr (!Mask::Blocks::contiguous) {
          const int m_block = row / Config::block_m;
          if (!needs_block_of<Config>(params, seqlen, work.batch, work.head, m_block, key)) continue;
        }
        if (is_hidden<Config>(params, seqlen, work.batch, head, row, key)) continue;
        const float row_lse = backward.row_lse[rows + row], row_delta = backward.row_delta[rows + row];
        Qk q;
        V dout;
        q.load(sequence.row(static_cast<const element*>(params.q), params.q_strides, head, seqlen.q_first_row + row),
               params.q_strides.dim);
        dout.load(sequence.row(static_cast<const element*>(backward.dout), backward.dout_strides, head,
                               seqlen.q_first_row + row),
                  backward.dout_strides.dim);
        if (is_without_keys(row_lse, row_delta)) dout.clear();
        const Entry entry = entry_of<Config>(backward, sequence, q, k, v, dout, head, row, key, row_lse, row_delta);
        if constexpr (of_values)
          settled = add_row(sums, entry.weight, dout, columns);
        else
          settled = add_row(sums, entry.ds, q, columns);
      }
    }
    sums.store(to, strides.dim, of_values ? 1.0f : params.softmax_scale, columns);
  }
}

// Called by one warp: repairs rows [first_row, first_row + rows) of dq of a query head of a sequence, as far as they
// are live.
template <class Config>
inline void repair_queries(const BackwardParams& backward, const Seqlen& seqlen, int batch, int head, i64 workspace,
                           int first_row, int rows) {
  using element = typename Config::element;
  using Qk = LaneColumns<element, Config::head_dim>;
  using V = LaneColumns<element, Config::head_dim_v>;
  using Mask = typename Config::mask;
  const Params& params = backward.forward;
  const RepairedSequence sequence{seqlen, batch};
  const int head_k = head / params.qheads_per_khead;
  __syncwarp();  // what other lanes have written
#pragma unroll 1
  for (int row = first_row; row < min_of(first_row + rows, seqlen.q); ++row) {
    element* const to =
        sequence.row(static_cast<element*>(backward.dq), backward.dq_strides, head, seqlen.q_first_row + row);
    Qk sums;
    sums.load(to, backward.dq_strides.dim);
    const u32 columns = sums.not_finite();
    if (!__any_sync(0xffffffffu, columns != 0)) continue;
    sums.clear();
    const float row_lse = backward.row_lse[workspace + row], row_delta = backward.row_delta[workspace + row];
    Qk q;
    V dout;
    q.load(sequence.row(static_cast<const element*>(params.q), params.q_strides, head, seqlen.q_first_row + row),
           params.q_strides.dim);
    dout.load(
        sequence.row(static_cast<const element*>(backward.dout), backward.dout_strides, head, seqlen.q_first_row + row),
        backward.dout_strides.dim);
    if (is_without_keys(row_lse, row_delta)) dout.clear();
    bool settled = false;
    const int last = Mask::last_key(params, seqlen, row);
#pragma unroll 1
    for (int key = Mask::first_key(params, seqlen, row); key <= last && !settled; ++key) {
      if constexpr (!Mask::Blocks::contiguous) {
        if (!needs_block_of<Config>(params, seqlen, batch, head_k, row / Config::block_m, key)) continue;
      }
      if (is_hidden<Config>(params, seqlen, batch, head, row, key)) continue;
      Qk k;
      V v;
      k.load(sequence.row(static_cast<const element*>(params.k), params.k_strides, head_k, seqlen.k_first_row + key),
             params.k_strides.dim);
      v.load(sequence.row(static_cast<const element*>(params.v), params.v_strides, head_k, seqlen.k_first_row + key),
             params.v_strides.dim);
      const Entry entry = entry_of<Config>(backward, sequence, q, k, v, dout, head, row, key, row_lse, row_delta);
      settled = add_row(sums, entry.ds, k, columns);
    }
    sums.store(to, backward.dq_strides.dim, params.softmax_scale, columns);
  }
}

// Every warp of a thread block takes a part of the same rows.
template <class Config>
inline void backward_repair(const BackwardArgument& argument) {
  const BackwardParams& backward = argument.params;
  if (*backward.not_finite == 0) return;
  const Params& forward = backward.forward;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int keys = ceil_div(Config::block_n, warps), queries = ceil_div(Config::block_m, warps);
  const int units = BackwardWork<Config>::units(backward);
#pragma unroll 1
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const BackwardWork<Config> work = BackwardWork<Config>::find(backward, unit);
    if (work.idle()) continue;
    const int first_key = work.n_block * Config::block_n + warp * keys;
    const int count = min_of(keys, Config::block_n - warp * keys);
    repair_keys<Config, false>(backward, work, first_key, count);
    repair_keys<Config, true>(backward, work, first_key, count);
  }
  const int tiles = forward.m_blocks * forward.num_heads_q * (Config::varlen ? 1 : forward.batch);
#pragma unroll 1
  for (int unit = blockIdx.x; unit < tiles; unit += gridDim.x) {
    const RowTile tile = RowTile::find<Config>(backward, unit, forward.m_blocks);
    if (tile.row < 0) continue;
    const int first_row = tile.m_block * Config::block_m;
    repair_queries<Config>(backward, tile.seqlen, tile.batch, tile.head, tile.row - first_row,
                           first_row + warp * queries, min_of(queries, Config::block_m - warp * queries));
  }
}

}  // namespace attention
