// emulated: cuda_src/ptx/mbarrier.cuh.
#pragma once

#include "core/types.cuh"

namespace ptx {

inline void mbarrier_init(u32 barrier, u32 arrivals) { emulated::mbarrier_init(barrier, arrivals); }
inline void fence_mbarrier_init() { emulated::fence_mbarrier_init(); }
inline void mbarrier_arrive(u32 barrier) { emulated::mbarrier_arrive(barrier); }

inline void mbarrier_arrive_expect_tx(u32 barrier, u32 bytes) { emulated::mbarrier_arrive_expect_tx(barrier, bytes); }

inline bool mbarrier_try_wait_parity(u32 barrier, u32 parity) {
  return emulated::mbarrier_try_wait_parity(barrier, parity);
}

inline bool mbarrier_test_wait_parity(u32 barrier, u32 parity) {
  return emulated::mbarrier_test_wait_parity(barrier, parity);
}

}  // namespace ptx
