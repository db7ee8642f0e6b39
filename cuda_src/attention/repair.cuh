// attention: rows whose output is not finite, computed once more, key by key.
//
// In a tile's products a key that a row does not see has probability 0, but 0 times NaN or infinity is NaN. Sums that
// are not yet divided may overflow where their mean does not, and so may means of the largest numbers by probabilities
// that were rounded. All of this shows in the output, seldom, and the columns of a row where it does are then made
// anew: only keys that the row sees are read, probabilities stay float32, and sums of the largest numbers are kept
// small.
#pragma once

#include "attention/block_range.cuh"
#include "attention/masks.cuh"
#include "attention/params.cuh"
#include "attention/variant.cuh"
#include "attention/work.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/fma.cuh"
#include "ptx/math.cuh"
#include "ptx/opaque.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// Whether something that was written is not finite. Infinity times any number is not finite, so in bfloat16, whose
// range is wide, one multiply-add looks at two numbers. Two above 2^62 may look infinite, and are then repaired in
// vain.
template <class element>
struct NotFinite {
  u32 seen = 0;

  void look(u32 packed, u32 other) {
    if constexpr (is_same<element, bf16>) {
      ptx::fma_x2<element>(seen, packed, other);
    } else {
      ptx::fma_x2<element>(seen, packed, 0);
      ptx::fma_x2<element>(seen, other, 0);
    }
  }

  bool found() const {
    u32 nothing = 0;
    ptx::fma_x2<element>(nothing, seen, 0);
    return (nothing & 0x7fff7fff) != 0;
  }
};

// Whether a sum that is still float32 is not finite: a number that overflows only in float16 is not looked for.
template <>
struct NotFinite<f32> {
  float seen = 0.0f;

  void look(float x, float y) { seen = fmaf(x, y, seen); }

  template <int m_tiles, int cols>
  void look_at(const tile::Accumulator<m_tiles, cols>& sums) {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int j = 0; j < cols / 8; ++j) {
        look(sums.x[t][j][0], sums.x[t][j][1]);
        look(sums.x[t][j][2], sums.x[t][j][3]);
      }
    }
  }

  bool found() const { return !(fabsf(seen) <= largest_float); }
};

// A lane's columns of a row: lane, lane + 32, and so on.
template <class element, int cols>
struct LaneColumns {
  static constexpr int count = ceil_div(cols, 32);
  float x[count];

  template <class its_element>
  void load(const its_element* row, i64 col_stride) {
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

  // Columns of row that have a bit in `chosen` ← factor · x.
  void store(element* row, i64 col_stride, float factor, u32 chosen) const {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int col = 32 * i + tile::lane();
      if (col < cols && chosen >> i & 1) row[col * col_stride] = ptx::cvt_rn<element>(factor * x[i]);
    }
  }

  // The columns that are not finite, one bit per column.
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

// Weighted sums of a lane's columns of v. Sums of columns that hold numbers near the largest are kept 2^-24 times as
// large, so that they do not overflow.
template <class Columns>
struct WeightedSums {
  static constexpr float large = float(1ull << 50) * float(1ull << 50), shrunk = 1.0f / (1 << 24);

  Columns sums;
  float factors[Columns::count];

  void clear() {
    sums.clear();
#pragma unroll
    for (int i = 0; i < Columns::count; ++i) factors[i] = 1.0f;
  }

  // sums ← kept · sums + weight · row. True if all of `columns` are NaN, which they then stay.
  bool add(float kept, float weight, const Columns& row, u32 columns) {
    bool settled = true;
#pragma unroll
    for (int i = 0; i < Columns::count; ++i) {
      if (fabsf(row.x[i]) > large && factors[i] == 1.0f) {
        factors[i] = shrunk;
        sums.x[i] *= shrunk;
      }
      sums.x[i] = fmaf(weight, row.x[i] * factors[i], kept * sums.x[i]);
      settled &= !(columns >> i & 1) || sums.x[i] != sums.x[i];
    }
    return __all_sync(0xffffffffu, settled);
  }

  // sums ← factor · sums, which then are means. Rounding must not make infinity of a mean of finite numbers.
  void finish(float factor) {
#pragma unroll
    for (int i = 0; i < Columns::count; ++i) {
      const float small = factor * sums.x[i], mean = small / factors[i];
      const bool overflows = fabsf(mean) == infinity && fabsf(small) <= largest_float;
      sums.x[i] = overflows ? copysignf(largest_float, mean) : mean;
    }
  }
};

// Called by one warp: repairs rows [first_row, first_row + rows) of the work's tiles, as far as they are live and not
// finite. Any work will do that says where rows are as `Work` does.
template <class Config, class AnyWork>
inline void repair(const Params& all, const AnyWork& work, int first_row, int rows) {
  using element = typename Config::element;
  using Out = LaneColumns<element, Config::head_dim_v>;
  using Qk = LaneColumns<element, Config::head_dim>;
  using Mask = typename Config::mask;
  const Params& params = ptx::opaque(all);
  const Seqlen& seqlen = work.seqlen;
  __syncwarp();  // the lane sees what other lanes have written
#pragma unroll 1
  for (int tile_row = first_row; tile_row < min_of(first_row + rows, work.rows()); ++tile_row) {
    element* const to = work.out_row(params, tile_row);
    Out out;
    out.load(to, params.out_strides.dim);
    const u32 columns = out.not_finite();
    if (!__any_sync(0xffffffffu, columns != 0)) continue;

    const int row = work.query_of(tile_row), head = work.head_of(tile_row), batch = work.batch();
    const typename Config::variant variant(params, batch, head);
    const float gain = Config::variant::gain(params.terms);
    Qk q, k;
    Out v;
    WeightedSums<Out> sums;
    q.load(work.query_row(params, tile_row), params.q_strides.dim);
    sums.clear();
    float row_max = -infinity, sum = 0.0f;  // the sum is of exponentials relative to row_max
    const int last = Mask::last_key(params, seqlen, row);
#pragma unroll 1
    for (int key = Mask::first_key(params, seqlen, row); key <= last; ++key) {
      if constexpr (!Mask::Blocks::contiguous) {
        const int head_k = head / params.qheads_per_khead;
        if (!needs_block_of<Config>(params, seqlen, batch, head_k, work.tile.m_block, key)) continue;
      }
      const Point at{batch, head, row, key, float(row + seqlen.diagonal() - key), true, seqlen.diagonal()};
      if (Config::variant::hides && !variant.keeps(at)) continue;
      k.load(work.key_row(params, key), params.k_strides.dim);
      v.load(work.value_row(params, key), params.v_strides.dim);
      const float score = variant.score(q.dot(k) * (params.softmax_scale * work.k_descale()), at);
      const float new_max = fminf(fmaxf(row_max, score), largest_float);
      const float subtracted = new_max == -infinity ? 0.0f : new_max;
      const float kept = ptx::ex2_approx_ftz((row_max - subtracted) * log2_e);
      const float p = ptx::ex2_approx_ftz((score - subtracted) * log2_e);
      sum = fmaf(kept, sum, p);
      row_max = new_max;
      if (sums.add(kept, p * variant.factor(at) * gain, v, columns)) break;
    }
    float kept = 1.0f;
    if (Config::sinks) {
      const float sink = params.sinks[head * params.sinks_stride];
      const float top = fminf(fmaxf(row_max, sink), largest_float), subtracted = top == -infinity ? 0.0f : top;
      kept = ptx::ex2_approx_ftz((row_max - subtracted) * log2_e);
      sum = fmaf(kept, sum, ptx::ex2_approx_ftz((sink - subtracted) * log2_e));
    }
    sums.finish(sum == 0.0f ? 0.0f : kept / sum * work.v_descale());
    sums.sums.store(to, params.out_strides.dim, 1.0f, columns);
  }
}

}  // namespace attention
