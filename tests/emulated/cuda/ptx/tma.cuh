// emulated: cuda_src/ptx/tma.cuh, which is not: headers of every kernel mention these functions, so they are declared,
// and a kernel that calls one is not linked. Nor are mbarrier.cuh, setmaxnreg.cuh and wgmma.cuh there. To add sm_90:
// barriers of bytes and arrivals, at which fibers wait as they do at named barriers; copies and wgmma as fibers of
// their own, which go on when the scheduler pleases; and in `ordered` in memory.cpp the order that mbarriers make.
#pragma once

#include "core/types.cuh"

namespace ptx {

struct alignas(64) TensorMap {
  char bytes[128];
};

void cp_async_bulk_tensor_4d(u32 destination, const TensorMap& map, u32 barrier, i32 c0, i32 c1, i32 c2, i32 c3);
void cp_async_bulk_tensor_5d(u32 destination, const TensorMap& map, u32 barrier, i32 c0, i32 c1, i32 c2, i32 c3,
                             i32 c4);
void cp_async_bulk(u32 destination, const void* source, u32 bytes, u32 barrier);
void cp_async_bulk_store(void* destination, u32 source, u32 bytes);
void cp_reduce_async_bulk_add_f32(float* destination, u32 source, u32 bytes);
void cp_async_bulk_commit_group();
template <int pending>
void cp_async_bulk_wait_group();
template <int pending>
void cp_async_bulk_wait_group_read();

}  // namespace ptx
