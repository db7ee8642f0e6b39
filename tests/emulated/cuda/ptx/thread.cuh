// emulated: cuda_src/ptx/thread.cuh.
#pragma once

#include "core/types.cuh"

namespace ptx {

inline u32 laneid() { return emulated::lane(); }
inline u32 tid_x() { return emulated::thread_index().x; }

}  // namespace ptx
