// attention: the online softmax over blocks of keys (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022).
#pragma once

#include "core/math.cuh"
#include "ptx/math.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// State of the rows a thread holds. Maxima are in exponents of 2, that is, after scaling: then the rounding of the
// scaled maximum is the same in every exponent it is subtracted from and cancels.
template <int m_tiles>
struct Softmax {
  float row_max[m_tiles][2];
  float row_sum[m_tiles][2];  // of this thread's columns; the quad's lanes are added once, at the end

  void init() {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
      row_max[t][0] = row_max[t][1] = -infinity;
      row_sum[t][0] = row_sum[t][1] = 0.0f;
    }
  }

  // scores ← exp2(scale · scores − row maximum); out is rescaled to the new maximum.
  template <int block_n, int out_cols>
  void update(tile::Accumulator<m_tiles, block_n>& scores, tile::Accumulator<m_tiles, out_cols>& out, float scale) {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float block_max = scores.x[t][0][2 * i];
#pragma unroll
        for (int j = 0; j < block_n / 8; ++j) {
          block_max = fmaxf(block_max, fmaxf(scores.x[t][j][2 * i], scores.x[t][j][2 * i + 1]));
        }
        const float new_max = fmaxf(row_max[t][i], warp::quad_max(block_max) * scale);
        // A row that has seen no key yet subtracts 0, not -infinity, which would give NaN.
        const float subtracted = new_max == -infinity ? 0.0f : new_max;
        const float correction = ptx::ex2_approx_ftz(row_max[t][i] - subtracted);
        row_max[t][i] = new_max;
        row_sum[t][i] *= correction;
#pragma unroll
        for (int j = 0; j < block_n / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& s = scores.x[t][j][2 * i + e];
            s = ptx::ex2_approx_ftz(fmaf(s, scale, -subtracted));
            row_sum[t][i] += s;
          }
        }
#pragma unroll
        for (int j = 0; j < out_cols / 8; ++j) {
          out.x[t][j][2 * i] *= correction;
          out.x[t][j][2 * i + 1] *= correction;
        }
      }
    }
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
