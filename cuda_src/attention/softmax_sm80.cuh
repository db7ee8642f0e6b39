// attention: the online softmax of the forward for every GPU, for all m-tiles of a warp at once.
#pragma once

#include "attention/softmax.cuh"
#include "core/math.cuh"
#include "ptx/math.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// Beside what Softmax does by m-tile: one branch for whatever rows are steep, and exponentials by steps of P·V, so that
// what lies between Q·Kᵀ and the end of P·V is one stretch that ptxas may interleave. The bits are those of Softmax.
template <class element, int m_tiles>
struct SoftmaxSm80 : Softmax<element, m_tiles> {
  using Base = Softmax<element, m_tiles>;
  using Base::base, Base::row_sum, Base::correction, Base::lag, Base::shift;

  float corrections[m_tiles][2];  // factors that the last `follow_all` wants for the rows of `out`

  // As Softmax::follow with `lag`, for all rows. The caller then rescales `out`, at least if this is true on one lane,
  // and exponentiates.
  template <int block_n>
  bool follow_all(tile::Accumulator<m_tiles, block_n>& scores, float scale) {
    float block_max[m_tiles][2];
    bool steep = false, stepped = false;
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) block_max[t][i] = Base::maximum(scores, t, i);
    }
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) steep |= this->is_or_gets_steep(block_max[t][i], scale, t, i);
    }
    if (unlikely(steep)) {
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          this->step_steeply(block_max[t][i], scale, lag, t, i);
          corrections[t][i] = correction[i];
          const float subtracted = this->is_steep(t, i) ? base[t][i] : 0.0f;
#pragma unroll
          for (int j = 0; j < block_n / 8; ++j) {
            scores.x[t][j][2 * i] -= subtracted;
            scores.x[t][j][2 * i + 1] -= subtracted;
          }
        }
      }
      stepped = true;
    } else {
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float exponent = Base::exponent_of(block_max[t][i], scale);
          const bool step = exponent + shift > base[t][i] + lag;
          this->step_to(exponent, step, t, i);
          corrections[t][i] = correction[i];
          stepped |= step;
        }
      }
    }
    return stepped;
  }

  template <int out_cols>
  void rescale_all(tile::Accumulator<m_tiles, out_cols>& out) const {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < out_cols / 8; ++j) {
          out.x[t][j][2 * i] *= corrections[t][i];
          out.x[t][j][2 * i + 1] *= corrections[t][i];
        }
      }
    }
  }

  // What exponentiates a block of scores by steps of 16 columns, as Softmax::exponentiate does all of them.
  struct Exponents {
    SoftmaxSm80& rows;
    float scale;
    float subtracted[m_tiles][2], sum[m_tiles][2];
    bool relative[m_tiles][2];

    Exponents(SoftmaxSm80& rows, float scale) : rows(rows), scale(scale) {
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float base = rows.base[t][i];
          relative[t][i] = rows.is_steep(t, i);
          subtracted[t][i] = relative[t][i] ? shift : base == -infinity ? 0.0f : base;
          sum[t][i] = fabsf(rows.row_sum[t][i]);
        }
      }
    }

    // Columns 16 step to 16 step + 15 of scores ← exponentials, which are added up.
    template <int block_n>
    void take(tile::Accumulator<m_tiles, block_n>& scores, int step) {
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 2 * step; j < 2 * step + 2; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& s = scores.x[t][j][2 * i + e];
              s = ptx::ex2_approx_ftz(fmaf(s, scale, -subtracted[t][i]));
              sum[t][i] += s;
            }
          }
        }
      }
    }

    void finish() {
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) rows.row_sum[t][i] = Base::signed_sum(sum[t][i], relative[t][i]);
      }
    }
  };
};

}  // namespace attention
