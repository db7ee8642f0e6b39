// attention: the online softmax over blocks of keys (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022).
#pragma once

#include "core/math.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// State of the rows a thread holds. Exponents are of 2, that is, scores after scaling, and relative to `row_max`: the
// maximum of the row, or up to `slack` less. Following only large steps of the maximum leaves out and the sums as they
// are in almost every block, costs no precision, and keeps every probability below 2^slack, far from any overflow. The
// rounding of the scaled maximum is the same in every exponent it is subtracted from and cancels.
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

  // Lets the maxima of m-tile t follow a block of scores. True if the warp must `rescale` it.
  template <int block_n>
  bool advance(const tile::Accumulator<m_tiles, block_n>& scores, float scale, int t = 0) {
    bool stepped = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float even = scores.x[t][0][2 * i], odd = scores.x[t][0][2 * i + 1];  // two chains: a maximum has latency
#pragma unroll
      for (int j = 1; j < block_n / 8; ++j) {
        even = fmaxf(even, scores.x[t][j][2 * i]);
        odd = fmaxf(odd, scores.x[t][j][2 * i + 1]);
      }
      const float block_max = warp::quad_max(fmaxf(even, odd)) * scale, old_max = row_max[t][i];
      const bool step = block_max > old_max + slack;
      row_max[t][i] = step ? block_max : old_max;
      correction[i] = step ? ptx::ex2_approx_ftz(old_max - block_max) : 1.0f;
      row_sum[t][i] *= correction[i];
      stepped |= step;
    }
    return __any_sync(0xffffffffu, stepped);
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

  // p ← what `exponentiate` and packing give, as long as no score exceeds row_max by more than slack; false, with
  // nothing changed but p, if one does. The maximum of the block is found beside the exponentials instead of before
  // them: in almost every block all it has to say is that row_max will do.
  template <class element, int block_n>
  bool exponentiate_if_close(tile::Operand<block_n>& p, const tile::Accumulator<1, block_n>& scores, float scale) {
    const float subtracted[2] = {row_max[0][0] == -infinity ? 0.0f : row_max[0][0],
                                 row_max[0][1] == -infinity ? 0.0f : row_max[0][1]};
    float sum[2] = {row_sum[0][0], row_sum[0][1]};
    float block_max[2] = {-infinity, -infinity};
#pragma unroll
    for (int s = 0; s < block_n / 16; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const pair = &scores.x[0][2 * s + i / 2][2 * (i % 2)];
        const float low = ptx::ex2_approx_ftz(fmaf(pair[0], scale, -subtracted[i % 2]));
        const float high = ptx::ex2_approx_ftz(fmaf(pair[1], scale, -subtracted[i % 2]));
        sum[i % 2] += low;
        sum[i % 2] += high;
        block_max[i % 2] = fmaxf(block_max[i % 2], fmaxf(pair[0], pair[1]));
        p.x[s][i] = ptx::cvt_rn_x2<element>(low, high);
      }
    }
    const bool close = block_max[0] * scale <= row_max[0][0] + slack && block_max[1] * scale <= row_max[0][1] + slack;
    if (!__all_sync(0xffffffffu, close)) return false;
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
