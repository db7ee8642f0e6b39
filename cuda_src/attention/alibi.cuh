// attention: the score term that lowers scores of keys that are far away.
#pragma once

#include "attention/params.cuh"
#include "attention/variant.cuh"

namespace attention {

// A score s becomes s - slope · |i + diagonal - j|: Press, Smith and Lewis, "Train Short, Test Long", 2022.
struct Alibi {
  static constexpr bool per_head = true;

  float slope;

  Alibi(const Params& params, int batch, int head)
      : slope(params.alibi_slopes[batch * params.alibi_batch_stride + head * params.alibi_head_stride]) {}

  float score(float s, const Point& at) const { return s - slope * fabsf(at.distance); }

  float dscore(float, const Point&) const { return 1.0f; }
};

}  // namespace attention
