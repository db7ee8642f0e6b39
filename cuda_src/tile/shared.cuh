// tile: a matrix tile in shared memory, stored as panels of up to 128 bytes per row and swizzled in 16-byte chunks, so
// that ldmatrix and 16-byte copies are free of bank conflicts both along rows and down columns.
#pragma once

#include "core/math.cuh"
#include "core/types.cuh"

namespace tile {

template <class element_, int rows_, int cols_>
struct SharedTile {
  using element = element_;
  static constexpr int rows = rows_, cols = cols_;
  static constexpr int row_bytes = cols * sizeof(element);
  static_assert(row_bytes % 32 == 0, "a row of a shared tile must be a multiple of 32 bytes");
  static_assert(rows % 8 == 0, "the swizzle repeats every 8 rows");

  static constexpr int panel_bytes = row_bytes % 128 == 0 ? 128 : row_bytes % 64 == 0 ? 64 : 32;
  static constexpr int panels = row_bytes / panel_bytes;
  static constexpr int panel_chunks = panel_bytes / 16;
  static constexpr int panel_stride = rows * panel_bytes;
  static constexpr int chunk_elements = 16 / sizeof(element);
  static constexpr int bytes = rows * row_bytes;

  // What a tile takes in a struct of shared memory. Such structs have their tiles first, each of which then lies as the
  // swizzle wants, and are no larger than their members.
  struct Storage {
    alignas(16) u8 data[bytes];
  };

  u32 base;  // shared-memory address, aligned to 128 bytes

  // Where the swizzle puts 16-byte chunk `chunk` of a panel: 8 consecutive rows fill all 32 banks at every chunk.
  static u32 swizzle(int row, int chunk) {
    return chunk ^ (panel_bytes == 128 ? row & 7 : panel_bytes == 64 ? (row >> 1) & 3 : (row >> 2) & 1);
  }

  u32 address(int row, int chunk) const {
    return base + (chunk / panel_chunks) * panel_stride + row * panel_bytes + (swizzle(row, chunk % panel_chunks) << 4);
  }

  // From the address of an even chunk of panel 0, the address of chunk + 2 * step in the same row.
  static u32 step_chunks(u32 from, int step) {
    constexpr int steps = panel_chunks / 2;
    return (from ^ ((step % steps) * 32)) + (step / steps) * panel_stride;
  }

  // From the address of a row, the address `count` rows below; count is a multiple of 8, which the swizzle ignores.
  static constexpr u32 step_rows(int count) { return count * panel_bytes; }

  // From the address of one of the first `rows_per_pass` rows, a divisor or a multiple of 8, the address `count` rows
  // below; count is a multiple of rows_per_pass.
  template <int rows_per_pass>
  static u32 step_passes(u32 from, int count) {
    if constexpr (rows_per_pass % 8 == 0) return from + step_rows(count);
    return (from ^ (swizzle(count, 0) << 4)) + step_rows(count);  // the two have no bit in common
  }

  // From an address in panel 0, the address `count` columns on; count is whole panels.
  static constexpr u32 step_cols(int count) { return count / (panel_chunks * chunk_elements) * panel_stride; }
};

template <auto member>
struct OffsetOf;
template <class Struct, class Type, Type Struct::* member>
struct OffsetOf<member> {
  static constexpr int value = __INTADDR__(&(static_cast<Struct*>(nullptr)->*member));
};

// How far from the beginning of a struct a member lies: offset<&Shared::k>. This is what offsetof expands to; NVRTC has
// no __builtin_offsetof before 13.3.
template <auto member>
inline constexpr int offset = OffsetOf<member>::value;

}  // namespace tile
