// emulated: cuda_src/ptx/shared.cuh.
#pragma once

#include "core/types.cuh"

namespace ptx {

inline u32 shared_address(const void* pointer) { return emulated::shared_address(pointer); }

template <class T>
inline T ld_shared_as(u32 address) {
  T value;
  emulated::ld_shared(&value, address, sizeof(T));
  return value;
}

inline u32 ld_shared_u32(u32 address) { return ld_shared_as<u32>(address); }
inline float2 ld_shared_f32x2(u32 address) { return ld_shared_as<float2>(address); }
inline uint2 ld_shared_v2(u32 address) { return ld_shared_as<uint2>(address); }
inline uint4 ld_shared_v4(u32 address) { return ld_shared_as<uint4>(address); }

inline void st_shared_u32(u32 address, u32 value) { emulated::st_shared(address, &value, sizeof(value)); }

inline void st_shared_v2(u32 address, u32 x, u32 y) {
  const uint2 value{x, y};
  emulated::st_shared(address, &value, sizeof(value));
}

inline void st_shared_v4(u32 address, const uint4& value) { emulated::st_shared(address, &value, sizeof(value)); }

inline u32 ld_relaxed_shared_u32(u32 address) { return emulated::ld_relaxed_shared(address); }
inline void st_relaxed_shared_u32(u32 address, u32 value) { emulated::st_relaxed_shared(address, value); }

inline void ldmatrix_x4(u32 (&r)[4], u32 address) { emulated::ldmatrix_x4(r, address, false); }
inline void ldmatrix_x4_trans(u32 (&r)[4], u32 address) { emulated::ldmatrix_x4(r, address, true); }
inline constexpr bool has_stmatrix = __CUDA_ARCH__ >= 900;
inline void stmatrix_x4(u32 address, const u32 (&r)[4]) { emulated::stmatrix_x4(address, r); }

inline void fence_proxy_async_shared() { emulated::fence_proxy_async(); }

}  // namespace ptx
