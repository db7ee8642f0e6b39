// emulated: cuda_src/ptx/tma.cuh.
#pragma once

#include "core/types.cuh"

namespace ptx {

struct alignas(64) TensorMap {
  char bytes[128];
};

inline void cp_async_bulk_tensor_4d(u32 destination, const TensorMap& map, u32 barrier, i32 c0, i32 c1, i32 c2,
                                    i32 c3) {
  const i32 at[] = {c0, c1, c2, c3};
  emulated::tensor_load(destination, &map, barrier, at, 4);
}

inline void cp_async_bulk_tensor_5d(u32 destination, const TensorMap& map, u32 barrier, i32 c0, i32 c1, i32 c2, i32 c3,
                                    i32 c4) {
  const i32 at[] = {c0, c1, c2, c3, c4};
  emulated::tensor_load(destination, &map, barrier, at, 5);
}

inline void cp_async_bulk(u32 destination, const void* source, u32 bytes, u32 barrier) {
  emulated::bulk_load(destination, source, bytes, barrier);
}

inline void cp_async_bulk_store(void* destination, u32 source, u32 bytes) {
  emulated::bulk_store(destination, source, bytes, false);
}

inline void cp_reduce_async_bulk_add_f32(float* destination, u32 source, u32 bytes) {
  emulated::bulk_store(destination, source, bytes, true);
}

inline void cp_async_bulk_commit_group() { emulated::bulk_commit_group(); }

template <int pending>
inline void cp_async_bulk_wait_group() {
  emulated::bulk_wait_group(pending, false);
}

template <int pending>
inline void cp_async_bulk_wait_group_read() {
  emulated::bulk_wait_group(pending, true);
}

}  // namespace ptx
