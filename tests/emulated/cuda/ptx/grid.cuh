// emulated: cuda_src/ptx/grid.cuh. A grid begins when the one before it has ended.
#pragma once

namespace ptx {

inline void grid_begin() {}

}  // namespace ptx
