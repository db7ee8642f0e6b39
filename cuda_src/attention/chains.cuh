// attention: a tile of queries whose sums are taken over, chain by chain; see tile/local.cuh.
#pragma once

#include "attention/softmax.cuh"
#include "core/math.cuh"
#include "ptx/math.cuh"
#include "tile/accumulator.cuh"
#include "tile/local.cuh"

namespace attention {

// The ends of a tile that a chain may have.
inline constexpr int first_end = 1, last_end = 2;

// Leaves the positions of chain `index` of a tile's blocks, which the tile goes over from last to first, `most` per
// chain, and sets which ends the chain has.
template <class Blocks>
constexpr void take_chain(Blocks& blocks, int& ends, int index, int most) {
  const int whole_end = blocks.end, end = whole_end - index * most;
  const int begin = max_of(blocks.begin, end - most);
  ends = (index == 0 ? first_end : 0) | (begin <= blocks.begin ? last_end : 0);
  blocks.begin = begin;
  blocks.end = end;
}

// Without `any` every tile is one chain, and nothing is taken over.
template <bool any, class element, int m_tiles, int cols>
struct Chains {
  using Statistics = Softmax<element, m_tiles>;

  tile::LocalSums<m_tiles, cols> sums;
  tile::LocalRows<m_tiles> base, row_sum;

  // The statistics of what `out` holds, which is finished: a tile, or a chain that has these ends of its tile.
  Statistics finished(tile::Accumulator<m_tiles, cols>& out, Statistics statistics, float scale, int ends) {
    if (any && unlikely(ends != (first_end | last_end))) {
      end(out, statistics, scale, ends & first_end, ends & last_end);
    }
    statistics.settle(scale);
    return statistics;
  }

  // Takes over a chain's out and statistics; the `last` chain gets those of all chains together.
  void end(tile::Accumulator<m_tiles, cols>& out, Statistics& statistics, float scale, bool first, bool last) {
    float old_factors[m_tiles][2], factors[m_tiles][2];
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        old_factors[t][i] = 0.0f;
        factors[t][i] = 1.0f;
        float &its_base = statistics.base[t][i], &its_sum = statistics.row_sum[t][i];
        if (!first) {
          const float old_base = base.load(t, i), old_sum = row_sum.load(t, i);
          const bool steep = Statistics::is_steep(its_sum), old_steep = Statistics::is_steep(old_sum);
          const float higher = Statistics::higher(old_base, old_sum, its_base, its_sum, scale);
          old_factors[t][i] = higher < 0.0f ? ptx::ex2_approx_ftz(higher) : 1.0f;
          factors[t][i] = higher > 0.0f ? ptx::ex2_approx_ftz(-higher) : 1.0f;
          const float sum = factors[t][i] * fabsf(its_sum) + old_factors[t][i] * fabsf(old_sum);
          its_sum = Statistics::signed_sum(sum, higher > 0.0f ? old_steep : steep);
          if (higher > 0.0f) its_base = old_base;
        }
        base.store(t, i, its_base);
        row_sum.store(t, i, its_sum);
      }
    }
    sums.take_over(out, old_factors, factors, first, last);
  }
};

}  // namespace attention
