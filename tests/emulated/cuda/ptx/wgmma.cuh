// emulated: cuda_src/ptx/wgmma.cuh.
#pragma once

#include "core/types.cuh"

namespace ptx {

inline void wgmma_fence() { emulated::wgmma_fence(); }
inline void wgmma_commit_group() { emulated::wgmma_commit_group(); }

template <int pending>
inline void wgmma_wait_group() {
  emulated::wgmma_wait_group(pending);
}

inline constexpr bool in_vain = false;  // which would be a race, if one without harm

inline void hold(float&) {}
inline void hold(u32&) {}

template <class element, bool transposed, int n_tiles>
inline void wgmma_ss(float (&d)[n_tiles][4], u64 a, u64 b, bool accumulate) {
  static_assert(is_same<element, bf16> || is_same<element, f16>, "wgmma here takes f16 or bf16");
  static_assert(n_tiles % 2 == 0 && n_tiles <= 32, "a wgmma has 16 to 256 columns here");
  emulated::wgmma(d[0], nullptr, {"wgmma", is_same<element, bf16>, false, transposed, accumulate, 8 * n_tiles, a, b});
}

template <class element, bool transposed, int n_tiles>
inline void wgmma_rs(float (&d)[n_tiles][4], const u32 (&a)[4], u64 b, bool accumulate) {
  static_assert(is_same<element, bf16> || is_same<element, f16>, "wgmma here takes f16 or bf16");
  static_assert(n_tiles % 2 == 0 && n_tiles <= 32, "a wgmma has 16 to 256 columns here");
  emulated::wgmma(d[0], a, {"wgmma", is_same<element, bf16>, true, transposed, accumulate, 8 * n_tiles, 0, b});
}

}  // namespace ptx
