// tile: elements of a row that lie side by side, read or written at once and held as float32.
#pragma once

#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "tile/copy.cuh"

namespace tile {

// `bytes` of a row: 16, 8 or 4, at an address that is a multiple of them, or a single element.
template <int bytes, class element>
struct Chunk {
  static constexpr int size = bytes / sizeof(element);
  using Stored = typename Words<bytes>::type;

  float x[size];

  // What lies in memory, for which nobody waits before it is made a chunk.
  static Stored fetch(const element* from) { return *reinterpret_cast<const Stored*>(from); }

  static Chunk of(const Stored& stored) {
    const union {
      Stored words;
      element elements[size];
    } held{stored};
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < size; ++i) chunk.x[i] = ptx::cvt_f32(held.elements[i]);
    return chunk;
  }

  static Chunk load(const element* from) { return of(fetch(from)); }

  void add(float factor, const Chunk& other) {
#pragma unroll
    for (int i = 0; i < size; ++i) x[i] = fmaf(factor, other.x[i], x[i]);
  }

  // Rounds to nearest even.
  void store(element* to) const {
    if constexpr (size == 1) {
      *to = ptx::cvt_rn<element>(x[0]);
    } else {
      union {
        Stored words;
        u32 registers[bytes / 4];
      } held;
#pragma unroll
      for (int i = 0; i < bytes / 4; ++i) {
        if constexpr (sizeof(element) == 4)
          held.registers[i] = __float_as_uint(x[i]);
        else
          held.registers[i] = ptx::cvt_rn_x2<element>(x[2 * i], x[2 * i + 1]);
      }
      *reinterpret_cast<Stored*>(to) = held.words;
    }
  }
};

}  // namespace tile
