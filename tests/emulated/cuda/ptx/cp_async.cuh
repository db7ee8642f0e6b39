// emulated: cuda_src/ptx/cp_async.cuh.
#pragma once

#include "core/types.cuh"

namespace ptx {

template <int size>
inline void cp_async(u32 destination, const void* source, int valid) {
  static_assert(size == 4 || size == 8 || size == 16, "cp.async copies 4, 8 or 16 bytes");
  emulated::cp_async(destination, source, size, valid);
}

inline u64 evict_normal() { return 0; }
inline u64 evict_first() { return 0; }

template <int size>
inline void cp_async(u32 destination, const void* source, int valid, u64) {
  cp_async<size>(destination, source, valid);
}

inline void cp_async_commit_group() { emulated::cp_async_commit_group(); }

template <int pending>
inline void cp_async_wait_group() {
  emulated::cp_async_wait_group(pending);
}

}  // namespace ptx
