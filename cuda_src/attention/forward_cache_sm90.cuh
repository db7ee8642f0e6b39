// attention: the forward kernel over caches of keys and values, for sm_90: the main loop for many query rows, on
// sequences whose lengths and pages only the device knows.
#pragma once

#include "attention/cache_prepare.cuh"
#include "attention/cache_tiles_sm90.cuh"
#include "attention/cache_tma_params.cuh"
#include "attention/forward_sm90.cuh"

namespace attention {

template <class Config>
inline void forward_cache_sm90(const CacheTmaParams& argument) {
  forward_tiles<Config, CachedTiles<Config>>(argument);
}

}  // namespace attention
