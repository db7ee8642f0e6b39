// emulated: cuda_src/ptx/barrier.cuh.
#pragma once

#include "core/types.cuh"

namespace ptx {

inline void bar_sync(u32 barrier, u32 threads) { emulated::bar_sync(barrier, threads); }
inline void bar_arrive(u32 barrier, u32 threads) { emulated::bar_arrive(barrier, threads); }

}  // namespace ptx
