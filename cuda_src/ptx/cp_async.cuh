// ptx: asynchronous copies from global to shared memory (PTX ISA: "Data Movement: cp.async"), sm_80 and newer.
#pragma once

#include "core/types.cuh"

namespace ptx {

// Copies `size` bytes; those from `valid` on are zero-filled, and none of them is read from `source`.
template <int size>
inline void cp_async(u32 destination, const void* source, int valid) {
  static_assert(size == 4 || size == 8 || size == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (size == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(source), "n"(size), "r"(valid)
                 : "memory");
  }
}

inline void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of the groups this thread committed are still in flight.
template <int pending>
inline void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace ptx
