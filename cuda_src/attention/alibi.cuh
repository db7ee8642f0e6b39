// attention: the score term that lowers scores of keys that are far away.
#pragma once

#include "attention/term.cuh"
#include "core/types.cuh"

namespace attention {

struct AlibiData {
  const float* alibi_slopes;  // (heads,) or (batch, heads)
  i64 batch_stride, head_stride;
};

// A score s becomes s - slope · |i + diagonal - j|: Press, Smith and Lewis, "Train Short, Test Long", 2022.
struct Alibi : Term {
  using Data = AlibiData;
  static constexpr bool bends = false;

  float slope;

  Alibi(const Data& data, int batch, int head)
      : slope(data.alibi_slopes[batch * data.batch_stride + head * data.head_stride]) {}

  float score(float s, const Point& at) const { return s - slope * fabsf(at.distance); }
};

}  // namespace attention
