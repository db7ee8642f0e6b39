// ptx: whether numbers are finite, many at a time (PTX ISA: "fma"): 0 times infinity or NaN is NaN, and stays it.
#pragma once

#include "core/types.cuh"

namespace ptx {

// seen ← 0 · packed + seen, for two 16-bit elements.
template <class element>
inline void fma_zero_x2(u32& seen, u32 packed) {
  if constexpr (is_same<element, bf16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(seen) : "r"(packed), "r"(0));
  } else {
    static_assert(is_same<element, f16>, "two elements fit a register only in 16 bits");
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(seen) : "r"(packed), "r"(0));
  }
}

}  // namespace ptx
