// emulated: cuda_src/ptx/cluster.cuh.
#pragma once

#include "core/types.cuh"

namespace ptx {

inline u32 cluster_ctarank() { return emulated::cluster_rank(); }
inline u32 cluster_nctarank() { return emulated::cluster_extent(); }

inline void cluster_arrive_relaxed() { emulated::cluster_arrive(); }
inline void cluster_wait() { emulated::cluster_wait(); }

inline u32 mapa(u32 address, u32 rank) { return emulated::mapa(address, rank); }

inline void st_async_v2(u32 address, u32 x, u32 y, u32 mbarrier) {
  const uint2 value{x, y};
  emulated::st_async(address, &value, sizeof(value), mbarrier);
}

inline void st_async_v4(u32 address, const uint4& value, u32 mbarrier) {
  emulated::st_async(address, &value, sizeof(value), mbarrier);
}

}  // namespace ptx
