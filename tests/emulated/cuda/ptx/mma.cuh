// emulated: cuda_src/ptx/mma.cuh.
#pragma once

#include "core/types.cuh"

namespace ptx {

template <class element>
inline void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  static_assert(is_same<element, bf16> || is_same<element, f16>, "m16n8k16 takes f16 or bf16");
  if constexpr (is_same<element, bf16>)
    emulated::mma_m16n8k16_bf16(d, a, b0, b1);
  else
    emulated::mma_m16n8k16_f16(d, a, b0, b1);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emulated::mma_m16n8k8_tf32(d, a, b0, b1);
}

}  // namespace ptx
