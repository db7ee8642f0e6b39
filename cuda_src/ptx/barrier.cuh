// ptx: named barriers among some of a block's warps (PTX ISA: "bar"). Barrier 0 is that of __syncthreads.
#pragma once

#include "core/types.cuh"

namespace ptx {

// Waits until `threads` threads, this one among them, have come to the barrier.
inline void bar_sync(u32 barrier, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Comes to the barrier and does not wait.
inline void bar_arrive(u32 barrier, u32 threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace ptx
