// attention: what a tile of queries has taken over of its sums; see tile/local.cuh.
#pragma once

#include "attention/softmax.cuh"
#include "core/math.cuh"
#include "ptx/math.cuh"
#include "tile/accumulator.cuh"
#include "tile/local.cuh"

namespace attention {

// The ends of a tile that a chain may have.
inline constexpr int first_end = 1, last_end = 2;

// With `any` there may be chains; else none is looked for.
template <bool any, class element, int m_tiles, int cols>
struct Chains {
  using Statistics = Softmax<element, m_tiles>;

  tile::LocalSums<m_tiles, cols> sums;
  tile::LocalRows<m_tiles> base, maxima, row_sum;

  // The statistics of a finished tile, or of a chain of one with such ends, in `out`.
  template <class Maxima>
  Statistics finished(tile::Accumulator<m_tiles, cols>& out, Statistics statistics, Maxima& its_maxima, float scale,
                      int ends) {
    if (any && unlikely(ends != (first_end | last_end))) {
      end(out, statistics, its_maxima, scale, ends & first_end, ends & last_end);
    }
    statistics.settle(scale, its_maxima);
    return statistics;
  }

  // Takes over out and its statistics, which are a chain's; the `last` one gets what all of them have together.
  template <class Maxima>
  void end(tile::Accumulator<m_tiles, cols>& out, Statistics& statistics, Maxima& its_maxima, float scale, bool first,
           bool last) {
    float old_factors[m_tiles][2], factors[m_tiles][2];
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        old_factors[t][i] = 0.0f;
        factors[t][i] = 1.0f;
        if (!first) {
          const float its_base = statistics.base[t][i], old_base = base.load(t, i);
          const float max = its_maxima.load(t, i), old_max = maxima.load(t, i);  // of steep rows
          // How much higher the exponents are that the old sums are relative to; NaN where neither has seen a key.
          const float higher = Statistics::is_steep(old_base) && Statistics::is_steep(its_base)
                                   ? (old_max - max) * scale
                                   : Statistics::top(old_base, old_max, scale) - Statistics::top(its_base, max, scale);
          old_factors[t][i] = higher < 0.0f ? ptx::ex2_approx_ftz(higher) : 1.0f;
          factors[t][i] = higher > 0.0f ? ptx::ex2_approx_ftz(-higher) : 1.0f;
          statistics.row_sum[t][i] = factors[t][i] * statistics.row_sum[t][i] + old_factors[t][i] * row_sum.load(t, i);
          if (higher > 0.0f) {
            statistics.base[t][i] = old_base;
            its_maxima.store(t, i, old_max);
          }
        }
        base.store(t, i, statistics.base[t][i]);
        maxima.store(t, i, its_maxima.load(t, i));
        row_sum.store(t, i, statistics.row_sum[t][i]);
      }
    }
    sums.take_over(out, old_factors, factors, first, last);
  }
};

}  // namespace attention
