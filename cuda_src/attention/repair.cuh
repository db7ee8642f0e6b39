// attention: rows whose output is not finite, computed once more, key by key.
//
// In a tile's products a key that a row does not see has probability 0, but 0 times NaN or infinity is NaN; and sums
// that are not yet divided may overflow where their mean does not. Both show in the output, seldom, and then the rows'
// columns where they do are made anew: only keys that the row sees are read, and a mean is kept instead of sums.
#pragma once

#include "attention/block_range.cuh"
#include "attention/params.cuh"
#include "attention/variant.cuh"
#include "attention/work.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/finite.cuh"
#include "ptx/math.cuh"
#include "ptx/opaque.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// Whether outputs may have to be: where there is a mask, or values for which float32 sums may be too small.
template <class Config>
inline constexpr bool repairs = Config::causal || Config::window || !is_same<typename Config::element, f16>;

// Whether something that was written is not finite; one of them speaks for all of its rows.
template <class element>
struct NotFinite {
  u32 seen = 0;

  void look(u32 packed) { ptx::fma_zero_x2<element>(seen, packed); }
  bool found() const { return (seen & 0x7fff7fff) != 0; }
};

// Of sums that are still float32: what overflows only in float16 is not looked for.
template <>
struct NotFinite<f32> {
  float seen = 0.0f;

  void look(float x) { seen = fmaf(x, 0.0f, seen); }

  template <int m_tiles, int cols>
  void look_at(const tile::Accumulator<m_tiles, cols>& sums) {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int j = 0; j < cols / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) look(sums.x[t][j][e]);
      }
    }
  }

  bool found() const { return seen != 0.0f; }
};

// A lane's columns of a row: lane, lane + 32, and so on.
template <class element, int cols>
struct LaneColumns {
  static constexpr int count = ceil_div(cols, 32);
  float x[count];

  void load(const element* row, i64 col_stride) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int col = 32 * i + tile::lane();
      x[i] = col < cols ? ptx::cvt_f32(row[col * col_stride]) : 0.0f;
    }
  }

  void clear() {
#pragma unroll
    for (int i = 0; i < count; ++i) x[i] = 0.0f;
  }

  // row ← factor times those of the columns that have a bit in `chosen`.
  void store(element* row, i64 col_stride, float factor, u32 chosen) const {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int col = 32 * i + tile::lane();
      if (col < cols && chosen >> i & 1) row[col * col_stride] = ptx::cvt_rn<element>(factor * x[i]);
    }
  }

  // Those that are not finite, a bit each.
  u32 not_finite() const {
    u32 found = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) found |= u32(!(fabsf(x[i]) <= largest_float)) << i;
    return found;
  }

  float dot(const LaneColumns& other) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < count; ++i) sum = fmaf(x[i], other.x[i], sum);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
  }
};

// a · a_weight + b · b_weight, where the weights are 1 together but for their rounding, which must not make infinity of
// the largest numbers.
inline float mean_of(float a, float a_weight, float b, float b_weight) {
  const float mean = fmaf(a, a_weight, b * b_weight);
  const bool finite = fabsf(a) <= largest_float && fabsf(b) <= largest_float;
  return finite && fabsf(mean) == infinity ? copysignf(largest_float, mean) : mean;
}

// One warp: rows [first_row, first_row + rows) of the work's tiles, as far as they are live and not finite.
template <class Config>
inline void repair(const Params& all, const Work<typename Config::element>& work, int first_row, int rows) {
  using element = typename Config::element;
  using Out = LaneColumns<element, Config::head_dim_v>;
  using Qk = LaneColumns<element, Config::head_dim>;
  using Span = KeySpan<Config::causal, Config::window>;
  const Params& params = ptx::opaque(all);
  const Seqlen& seqlen = work.seqlen;
  __syncwarp();  // what other lanes have written
#pragma unroll 1
  for (int tile_row = first_row; tile_row < min_of(first_row + rows, work.template rows<Config>()); ++tile_row) {
    element* const to = work.template out_row<Config>(params, tile_row);
    Out out;
    out.load(to, params.out_strides.dim);
    const u32 columns = out.not_finite();
    if (!__any_sync(0xffffffffu, columns != 0)) continue;

    const int row = tile_row / Config::pack, head = work.tile.head * Config::pack + tile_row % Config::pack;
    const int head_k = head / params.qheads_per_khead;
    const typename Config::variant variant(params, work.tile.batch, head);
    Qk q, k;
    Out v, mean;
    q.load(work.origin(params.q, params.q_strides, head, seqlen.q_first_row + row), params.q_strides.dim);
    mean.clear();
    float row_max = -infinity, sum = 0.0f;  // of exponentials relative to row_max
    const int last = Span::last(params, seqlen, row);
#pragma unroll 1
    for (int key = Span::first(params, seqlen, row); key <= last; ++key) {
      k.load(work.origin(params.k, params.k_strides, head_k, seqlen.k_first_row + key), params.k_strides.dim);
      v.load(work.origin(params.v, params.v_strides, head_k, seqlen.k_first_row + key), params.v_strides.dim);
      const float score = variant.score(q.dot(k) * params.softmax_scale, float(row + seqlen.diagonal() - key));
      const float new_max = fminf(fmaxf(row_max, score), largest_float);
      const float subtracted = new_max == -infinity ? 0.0f : new_max;
      const float kept = sum * ptx::ex2_approx_ftz((row_max - subtracted) * log2_e);
      const float p = ptx::ex2_approx_ftz((score - subtracted) * log2_e);
      sum = kept + p;
      row_max = new_max;
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      bool settled = true;  // the columns are NaN, and so they stay
#pragma unroll
      for (int i = 0; i < Out::count; ++i) {
        mean.x[i] = mean_of(mean.x[i], kept * inverse, v.x[i], p * inverse);
        settled &= !(columns >> i & 1) || mean.x[i] != mean.x[i];
      }
      if (__all_sync(0xffffffffu, settled)) break;
    }
    if (Config::sinks) {
      const float sink = params.sinks[head * params.sinks_stride];
      const float top = fminf(fmaxf(row_max, sink), largest_float), subtracted = top == -infinity ? 0.0f : top;
      const float kept = sum * ptx::ex2_approx_ftz((row_max - subtracted) * log2_e);
      const float all = kept + ptx::ex2_approx_ftz((sink - subtracted) * log2_e);
#pragma unroll
      for (int i = 0; i < Out::count; ++i) mean.x[i] *= all == 0.0f ? 0.0f : kept / all;
    }
    mean.store(to, params.out_strides.dim, 1.0f, columns);
  }
}

}  // namespace attention
