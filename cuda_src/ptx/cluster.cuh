// ptx: thread block clusters, whose blocks run side by side and write to each other's shared memory (PTX ISA:
// "barrier.cluster", "mapa", "st.async"), sm_90 and newer.
#pragma once

#include "core/types.cuh"

namespace ptx {

// Which block of its cluster this is, and how many the cluster has.
inline u32 cluster_ctarank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

inline u32 cluster_nctarank() {
  u32 blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}

// Comes to the barrier of all threads of the cluster that have not ended, and does not wait. All lanes of a warp come
// together. Nobody is told what this thread has written, but of mbarriers behind fence_mbarrier_init.
inline void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" :::); }

// Waits until all have come. A thread waits before it comes again.
inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Returns what block `rank` of the cluster has where this block has `address`, a shared one.
inline u32 mapa(u32 address, u32 rank) {
  u32 mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// Stores to an address that mapa returns, at some time, and completes its bytes on the mbarrier of the same block. That
// must have begun, as it has when it has come to the barrier of the cluster, and must not end before.
inline void st_async_v2(u32 address, u32 x, u32 y, u32 mbarrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(address),
               "r"(x), "r"(y), "r"(mbarrier)
               : "memory");
}

inline void st_async_v4(u32 address, const uint4& value, u32 mbarrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(mbarrier)
      : "memory");
}

}  // namespace ptx
