// attention: the online softmax over blocks of keys (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022).
#pragma once

#include "core/math.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// State of the rows a thread holds. Exponents are of 2, that is, scores after scaling, and relative to `row_max`: the
// maximum of the row, or so little less that no probability comes near an overflow. Following only large steps of the
// maximum leaves out and the sums as they are in almost every block and costs no precision. The rounding of the scaled
// maximum is the same in every exponent it is subtracted from and cancels.
template <int m_tiles>
struct Softmax {
  static constexpr float slack = 8.0f;

  float row_max[m_tiles][2];
  float row_sum[m_tiles][2];  // of this thread's columns; the quad's lanes are added once, at the end
  float correction[2];        // what the last `advance` wants its rows of out multiplied by

  void init() {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
      row_max[t][0] = row_max[t][1] = -infinity;
      row_sum[t][0] = row_sum[t][1] = 0.0f;
    }
  }

  // Lets the maxima of m-tile t follow a block of scores where they exceed row_max by more than slack. True if the warp
  // must `rescale` it.
  template <int block_n>
  bool advance(const tile::Accumulator<m_tiles, block_n>& scores, float scale, int t = 0) {
    bool stepped = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float block_max = maximum(scores, t, i) * scale;
      const bool step = block_max > row_max[t][i] + slack;
      follow(block_max, step, t, i);
      stepped |= step;
    }
    return __any_sync(0xffffffffu, stepped);
  }

  // The same for the rows that `accept` found `far`, on any lane of the quad.
  template <int block_n>
  void advance(const tile::Accumulator<m_tiles, block_n>& scores, float scale, const bool (&far)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float block_max = maximum(scores, 0, i) * scale;
      follow(block_max, warp::quad_max(float(far[i])) > 0.0f && block_max > row_max[0][i], 0, i);
    }
  }

  template <int block_n>
  static float maximum(const tile::Accumulator<m_tiles, block_n>& scores, int t, int i) {
    float even = scores.x[t][0][2 * i], odd = scores.x[t][0][2 * i + 1];  // two chains: a maximum has latency
#pragma unroll
    for (int j = 1; j < block_n / 8; ++j) {
      even = fmaxf(even, scores.x[t][j][2 * i]);
      odd = fmaxf(odd, scores.x[t][j][2 * i + 1]);
    }
    return warp::quad_max(fmaxf(even, odd));
  }

  void follow(float block_max, bool step, int t, int i) {
    const float old_max = row_max[t][i];
    row_max[t][i] = step ? block_max : old_max;
    correction[i] = step ? ptx::ex2_approx_ftz(old_max - block_max) : 1.0f;
    row_sum[t][i] *= correction[i];
  }

  template <int out_cols>
  void rescale(tile::Accumulator<m_tiles, out_cols>& out, int t = 0) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < out_cols / 8; ++j) {
        out.x[t][j][2 * i] *= correction[i];
        out.x[t][j][2 * i + 1] *= correction[i];
      }
    }
  }

  // scores ← exp2(scale · scores − row_max), and their sums. A row that has seen no key yet subtracts 0, not -infinity,
  // which would give NaN.
  template <int block_n>
  void exponentiate(tile::Accumulator<m_tiles, block_n>& scores, float scale, int t = 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float subtracted = row_max[t][i] == -infinity ? 0.0f : row_max[t][i];
#pragma unroll
      for (int j = 0; j < block_n / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& s = scores.x[t][j][2 * i + e];
          s = ptx::ex2_approx_ftz(fmaf(s, scale, -subtracted));
          row_sum[t][i] += s;
        }
      }
    }
  }

  // p ← what `exponentiate` and packing give for steps [begin, end) of P·V, as long as `accept` then finds that row_max
  // would do. Nothing else changes but `sum`, which begins as row_sum.
  template <class element, int begin, int end, int block_n>
  void exponentiate_at_once(tile::Operand<block_n>& p, const tile::Accumulator<1, block_n>& scores, float scale,
                            float (&sum)[2]) const {
#pragma unroll
    for (int s = begin; s < end; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const pair = &scores.x[0][2 * s + i / 2][2 * (i % 2)];
        const float low = ptx::ex2_approx_ftz(fmaf(pair[0], scale, -row_max[0][i % 2]));
        const float high = ptx::ex2_approx_ftz(fmaf(pair[1], scale, -row_max[0][i % 2]));
        sum[i % 2] += low;
        sum[i % 2] += high;
        p.x[s][i] = ptx::cvt_rn_x2<element>(low, high);
      }
    }
  }

  // Whether that kept every exponential within bounds; else `far` are the thread's rows where it did not. No maximum is
  // sought: that the sums, needed anyway, stay small says that row_max will do, and so it does in almost every block.
  // The bound on what a thread adds bounds each of its probabilities too, and only a term above 2^slack exceeds it.
  // A row that has seen no key is far: its row_max is -infinity, and the sum infinite or NaN. What a row gets depends
  // on itself alone: if it is not far, the other path gives it the same bits.
  template <int block_n>
  bool accept(const float (&sum)[2], bool (&far)[2]) {
    constexpr float bound = block_n / 4 * (1 << int(slack));
    static_assert(bound < 65504.0f, "a float16 holds it");
    far[0] = !(sum[0] <= row_sum[0][0] + bound);
    far[1] = !(sum[1] <= row_sum[0][1] + bound);
    if (__any_sync(0xffffffffu, far[0] || far[1])) return false;
    row_sum[0][0] = sum[0];
    row_sum[0][1] = sum[1];
    return true;
  }

  // Divides out by the sum and leaves the natural log-sum-exp in row_max. sink, the score of a key without a value, is
  // -infinity where there is none. A row without keys gets out = 0 and lse = sink.
  template <int out_cols>
  void finish(tile::Accumulator<m_tiles, out_cols>& out, float sink) {
    const float sink_exponent = sink * log2_e;
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float keys_max = row_max[t][i], new_max = fmaxf(keys_max, sink_exponent);
        const float subtracted = new_max == -infinity ? 0.0f : new_max;
        const float rescale = ptx::ex2_approx_ftz(keys_max - subtracted);
        const float sum = warp::quad_sum(row_sum[t][i]) * rescale + ptx::ex2_approx_ftz(sink_exponent - subtracted);
        const float factor = sum == 0.0f ? 0.0f : rescale * ptx::rcp_approx_ftz(sum);
        row_max[t][i] = (subtracted + ptx::lg2_approx(sum)) * ln_2;
#pragma unroll
        for (int j = 0; j < out_cols / 8; ++j) {
          out.x[t][j][2 * i] *= factor;
          out.x[t][j][2 * i + 1] *= factor;
        }
      }
    }
  }
};

}  // namespace attention
