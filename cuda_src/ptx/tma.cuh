// ptx: bulk copies between global and shared memory, of boxes of tensors and of bytes (PTX ISA: "cp.async.bulk.tensor",
// "cp.async.bulk", "cp.reduce.async.bulk"), sm_90.
#pragma once

#include "core/types.cuh"

namespace ptx {

// An opaque map of a tensor, made by the driver. A kernel finds it in its arguments.
struct alignas(64) TensorMap {
  char bytes[128];
};

// Copies the box at these coordinates, innermost first. Elements outside the tensor become zeros, and count as bytes.
inline void cp_async_bulk_tensor_4d(u32 destination, const TensorMap& map, u32 barrier, i32 c0, i32 c1, i32 c2,
                                    i32 c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(destination),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

inline void cp_async_bulk_tensor_5d(u32 destination, const TensorMap& map, u32 barrier, i32 c0, i32 c1, i32 c2, i32 c3,
                                    i32 c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(destination),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Copies `bytes` contiguous bytes, a multiple of 16.
inline void cp_async_bulk(u32 destination, const void* source, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

// Copies from shared to global memory.
inline void cp_async_bulk_store(void* destination, u32 source, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination), "r"(source), "r"(bytes)
               : "memory");
}

// Adds float32 numbers in shared memory to those in global memory.
inline void cp_reduce_async_bulk_add_f32(float* destination, u32 source, u32 bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(destination),
               "r"(source), "r"(bytes)
               : "memory");
}

inline void cp_async_bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's groups are still running.
template <int pending>
inline void cp_async_bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}

// The same, where a group counts as running while it still reads shared memory.
template <int pending>
inline void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

}  // namespace ptx
