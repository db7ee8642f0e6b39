// attention: counts chunks of strided arrays along four axes, for kernels that go through whole arrays.
#pragma once

#include "core/types.cuh"

namespace attention {

// A chunk by its index along each axis, the fastest first, or how far two chunks are apart. Indices along all axes but
// the last are less than the extents. Steps of an array are in elements.
struct ChunkIndex {
  static constexpr int axes = 4;

  u32 along[axes];

  ChunkIndex(u32 number, const i32* extents) {
#pragma unroll
    for (int axis = 0; axis < axes - 1; ++axis) {
      along[axis] = number % u32(extents[axis]);
      number /= u32(extents[axis]);
    }
    along[axes - 1] = number;
  }

  // Carries instead of dividing: the divisions of 64 bits that large arrays would need are slow.
  void advance(const ChunkIndex& step, const i32* extents) {
    u32 carry = 0;
#pragma unroll
    for (int axis = 0; axis < axes - 1; ++axis) {
      along[axis] += step.along[axis] + carry;
      carry = along[axis] >= u32(extents[axis]);
      if (carry) along[axis] -= extents[axis];
    }
    along[axes - 1] += step.along[axes - 1] + carry;
  }

  bool is_inside(const i32* extents) const { return along[axes - 1] < u32(extents[axes - 1]); }

  i64 element(const i64* steps) const { return along[0] * steps[0] + row_element(steps); }

  // Of the first chunk along the fastest axis.
  i64 row_element(const i64* steps) const {
    i64 sum = 0;
#pragma unroll
    for (int axis = 1; axis < axes; ++axis) sum += along[axis] * steps[axis];
    return sum;
  }
};

}  // namespace attention
