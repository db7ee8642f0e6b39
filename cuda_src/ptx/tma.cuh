// ptx: copies of boxes of tensors between global and shared memory (PTX ISA: "cp.async.bulk.tensor"), sm_90.
#pragma once

#include "core/types.cuh"

namespace ptx {

// Opaque; made by the driver. A kernel finds it in its arguments.
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

}  // namespace ptx
