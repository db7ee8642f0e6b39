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

// Returns the policy of what may stay in the L2 like anything else.
inline u64 evict_normal() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Returns the policy of what is read once: its lines are the first to leave the L2.
inline u64 evict_first() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// The same copy, by a policy of the L2.
template <int size>
inline void cp_async(u32 destination, const void* source, int valid, u64 policy) {
  static_assert(size == 4 || size == 8 || size == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (size == 16) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(destination), "l"(source),
                 "r"(valid), "l"(policy)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %2, %3, %4;" ::"r"(destination), "l"(source),
                 "n"(size), "r"(valid), "l"(policy)
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
