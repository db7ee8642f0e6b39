// ptx: multiply-adds of two 16-bit elements at a time (PTX ISA: "fma"). A sum that is not finite stays so.
#pragma once

#include "core/types.cuh"

namespace ptx {

// sum ← a · b + sum.
template <class element>
inline void fma_x2(u32& sum, u32 a, u32 b) {
  if constexpr (is_same<element, bf16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
  } else {
    static_assert(is_same<element, f16>, "two elements fit a register only in 16 bits");
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
  }
}

// a · b.
template <class element>
inline u32 mul_x2(u32 a, u32 b) {
  u32 product;
  if constexpr (is_same<element, bf16>) {
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  } else {
    static_assert(is_same<element, f16>, "two elements fit a register only in 16 bits");
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  }
  return product;
}

}  // namespace ptx
