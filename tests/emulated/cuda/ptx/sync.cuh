// emulated: cuda_src/ptx/sync.cuh.
#pragma once

#include "core/types.cuh"

namespace ptx {

inline i32 ld_acquire_gpu(const i32* address) { return emulated::ld_acquire(address); }
inline void st_release_gpu(i32* address, i32 value) { emulated::st_release(address, value); }
inline i32 atom_acquire_gpu_cas(i32* address, i32 expected, i32 value) {
  return emulated::atomic_cas(address, expected, value);
}
inline i32 atom_acq_rel_gpu_add(i32* address, i32 value) { return emulated::atomic_add(address, value, true); }
inline i32 atom_acq_rel_gpu_inc(i32* address, i32 last) { return emulated::atomic_inc(address, last); }
inline void red_release_gpu_add(i32* address, i32 value) { emulated::atomic_add(address, value, false); }
inline void fence_proxy_async_global() {}

}  // namespace ptx
