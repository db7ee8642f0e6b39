// ptx: who this thread is (PTX ISA: "Special Registers").
//
// Reads are volatile so that the compiler computes what depends on them anew in every iteration of a main loop instead of
// keeping dozens of addresses in registers that the accumulators need: a few integer instructions against a spill.
#pragma once

#include "core/types.cuh"

namespace ptx {

inline int laneid() {
  u32 lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return static_cast<int>(lane);
}

inline int tid_x() {
  u32 tid;
  asm("mov.u32 %0, %%tid.x;" : "=r"(tid));
  return static_cast<int>(tid);
}

}  // namespace ptx
