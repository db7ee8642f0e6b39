// emulated: what NVRTC and CUDA give every kernel without an include: types, builtin variables and functions.
#pragma once

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (::emulated::thread_index())
#define blockIdx (::emulated::block_index())
#define blockDim (::emulated::block_extent())
#define gridDim (::emulated::grid_extent())
#define warpSize 32

struct __align__(8) float2 {
  float x, y;
};
struct __align__(16) float4 {
  float x, y, z, w;
};
struct __align__(8) int2 {
  int x, y;
};
struct __align__(16) int4 {
  int x, y, z, w;
};
struct __align__(8) uint2 {
  unsigned x, y;
};
struct __align__(16) uint4 {
  unsigned x, y, z, w;
};

extern "C" {
float exp2f(float) noexcept;
float expf(float) noexcept;
float log2f(float) noexcept;
float logf(float) noexcept;
float powf(float, float) noexcept;
float tanhf(float) noexcept;
}

inline float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float fabsf(float x) { return __builtin_fabsf(x); }
inline float copysignf(float size, float sign) { return __builtin_copysignf(size, sign); }
inline float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
inline float fminf(float a, float b) { return __builtin_fminf(a, b); }
inline float floorf(float x) { return __builtin_floorf(x); }
inline float ceilf(float x) { return __builtin_ceilf(x); }
inline float rintf(float x) { return __builtin_rintf(x); }
inline float sqrtf(float x) { return __builtin_sqrtf(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

constexpr int min(int a, int b) { return a < b ? a : b; }
constexpr int max(int a, int b) { return a > b ? a : b; }
constexpr unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
constexpr unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
constexpr long long min(long long a, long long b) { return a < b ? a : b; }
constexpr long long max(long long a, long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned places) {
  const unsigned long long bytes = low | (unsigned long long)high << 32;
  unsigned chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= unsigned(bytes >> 8 * (places >> 4 * i & 7) & 0xff) << 8 * i;
  return chosen;
}

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline void __syncthreads() { ::emulated::sync_threads(::emulated::Join::none, 0); }
inline int __syncthreads_or(int x) { return ::emulated::sync_threads(::emulated::Join::any, x); }
inline int __syncthreads_and(int x) { return ::emulated::sync_threads(::emulated::Join::all, x); }
inline int __syncthreads_count(int x) { return ::emulated::sync_threads(::emulated::Join::count, x); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::emulated::sync_warp(mask); }

// Memory is the same for all threads at all times.
inline void __threadfence() {}
inline void __threadfence_block() {}

inline int atomicAdd(int* address, int value) { return ::emulated::atomic_add_relaxed(address, value); }

inline unsigned __ballot_sync(unsigned mask, int x) { return ::emulated::vote(::emulated::Vote::ballot, mask, x); }
inline int __any_sync(unsigned mask, int x) { return ::emulated::vote(::emulated::Vote::any, mask, x); }
inline int __all_sync(unsigned mask, int x) { return ::emulated::vote(::emulated::Vote::all, mask, x); }
inline int __reduce_max_sync(unsigned mask, int x) {
  return ::emulated::vote(::emulated::Vote::signed_maximum, mask, x);
}
inline int __reduce_min_sync(unsigned mask, int x) {
  return ::emulated::vote(::emulated::Vote::signed_minimum, mask, x);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned x) {
  return ::emulated::vote(::emulated::Vote::maximum, mask, x);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned x) {
  return ::emulated::vote(::emulated::Vote::minimum, mask, x);
}
inline int __reduce_add_sync(unsigned mask, int x) { return ::emulated::vote(::emulated::Vote::sum, mask, x); }
inline unsigned __reduce_add_sync(unsigned mask, unsigned x) {
  return ::emulated::vote(::emulated::Vote::sum, mask, x);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned x) {
  return ::emulated::vote(::emulated::Vote::bit_or, mask, x);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned x) {
  return ::emulated::vote(::emulated::Vote::bit_and, mask, x);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned x) {
  return ::emulated::vote(::emulated::Vote::bit_xor, mask, x);
}

namespace emulated {

// Numbers of 4 or 8 bytes travel in one word or two.
template <class T>
inline T shuffled(unsigned mask, T x, u32 source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle takes numbers of 4 or 8 bytes");
  union {
    T x;
    u32 words[sizeof(T) / 4];
  } held{x};
  for (u32& word : held.words) word = shuffle(mask, word, source);
  return held.x;
}

}  // namespace emulated

template <class T>
inline T __shfl_sync(unsigned mask, T x, int source, int width = 32) {
  const unsigned lane = ::emulated::lane(), first = lane & ~unsigned(width - 1);
  return ::emulated::shuffled(mask, x, first + (unsigned(source) & unsigned(width - 1)));
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T x, int step, int width = 32) {
  const unsigned lane = ::emulated::lane(), source = lane ^ unsigned(step), end = (lane | unsigned(width - 1)) + 1;
  return ::emulated::shuffled(mask, x, source < end ? source : lane);
}

template <class T>
inline T __shfl_up_sync(unsigned mask, T x, unsigned step, int width = 32) {
  const unsigned lane = ::emulated::lane(), first = lane & ~unsigned(width - 1);
  return ::emulated::shuffled(mask, x, lane >= first + step ? lane - step : lane);
}

template <class T>
inline T __shfl_down_sync(unsigned mask, T x, unsigned step, int width = 32) {
  const unsigned lane = ::emulated::lane(), end = (lane | unsigned(width - 1)) + 1;
  return ::emulated::shuffled(mask, x, lane + step < end ? lane + step : lane);
}

template <class T>
inline T __ldcg(const T* address) {
  return *address;
}
template <class T>
inline T __ldcs(const T* address) {
  return *address;
}
template <class T>
inline T __ldg(const T* address) {
  return *address;
}
