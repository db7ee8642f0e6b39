// emulated: cuda_src/ptx/movmatrix.cuh.
#pragma once

#include "core/types.cuh"

namespace ptx {

inline u32 movmatrix_trans(u32 x) {
  const u32 column = emulated::lane() / 4, row = 2 * (emulated::lane() % 4), shift = 16 * (column % 2);
  const u32 low = emulated::shuffle(0xffffffffu, x, 4 * row + column / 2) >> shift & 0xffffu;
  const u32 high = emulated::shuffle(0xffffffffu, x, 4 * (row + 1) + column / 2) >> shift & 0xffffu;
  return low | high << 16;
}

}  // namespace ptx
