// ptx: who this thread is (PTX ISA: "Special Registers").
#pragma once

#include "core/types.cuh"

namespace ptx {

// Volatile, so that what depends on it is computed anew in every iteration of a main loop: a few integer instructions
// against dozens of addresses held in registers that the accumulators need.
inline u32 laneid() {
  u32 lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

inline u32 tid_x() {
  u32 tid;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(tid));
  return tid;
}

}  // namespace ptx
