// tile: block-wide copies between strided global memory and shared tiles.
#pragma once

#include "core/types.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared.cuh"
#include "ptx/thread.cuh"
#include "tile/shared.cuh"

namespace tile {

// Rows of one head in global memory; strides in elements. col_stride is read only where elements are copied singly.
template <class element>
struct GlobalRows {
  element* pointer;
  i64 row_stride, col_stride;

  element* row(i64 index) const { return pointer + index * row_stride; }
};

}  // namespace tile

namespace block {

// Calls copy(pointer, row, chunk, address) for the 16-byte chunks of the tile that belong to this thread, lanes along a
// row first. Not unrolled: the addresses of all passes at once would take the registers that the accumulators need.
template <int num_threads, class Tile, class element, class Copy>
inline void for_each_chunk(const Tile& tile, const tile::GlobalRows<element>& rows, int first_row, Copy&& copy) {
  constexpr int rows_per_pass = num_threads / Tile::panel_chunks;
  const u32 thread = ptx::tid_x();
  const int row = thread / Tile::panel_chunks, chunk = thread % Tile::panel_chunks;
  const u32 address = tile.address(row, chunk);
#pragma unroll 1
  for (int pass = 0; pass < ceil_div(Tile::rows, rows_per_pass); ++pass) {
    if (Tile::rows % rows_per_pass != 0 && row + pass * rows_per_pass >= Tile::rows) return;
    element* const pointer = rows.row(first_row + row) + pass * rows_per_pass * rows.row_stride;
#pragma unroll
    for (int panel = 0; panel < Tile::panels; ++panel) {
      copy(pointer, first_row + row + pass * rows_per_pass, panel * Tile::panel_chunks + chunk,
           address + panel * Tile::panel_stride + Tile::step_rows(pass * rows_per_pass));
    }
  }
}

// dst ← rows [first_row, first_row + Tile::rows) of src. Rows from row_limit on and columns from valid_cols on become
// zeros and are never read. copy_bytes = sizeof(element) copies single elements, synchronously and with any
// col_stride; 4, 8 and 16 are asynchronous and need that alignment of every row and a col_stride of 1.
template <int num_threads, int copy_bytes, int valid_cols, class Tile, class element>
inline void load(const Tile& dst, const tile::GlobalRows<const element>& src, int first_row, int row_limit) {
  constexpr int valid_bytes = valid_cols * sizeof(element);
  for_each_chunk<num_threads>(dst, src, first_row, [&](const element* from, int row, int chunk, u32 to) {
    const bool live = row < row_limit;
    if constexpr (copy_bytes > sizeof(element) || copy_bytes == 16) {
#pragma unroll
      for (int byte = 0; byte < 16; byte += copy_bytes) {
        const int valid = clamp(valid_bytes - (chunk * 16 + byte), 0, copy_bytes);
        ptx::cp_async<copy_bytes>(to + byte, reinterpret_cast<const char*>(from) + chunk * 16 + byte,
                                  live ? valid : 0);
      }
    } else {
      union {
        element elements[Tile::chunk_elements];
        uint4 words;
      } gathered;
      gathered.words = uint4{0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < Tile::chunk_elements; ++i) {
        const int col = chunk * Tile::chunk_elements + i;
        if (live && col < valid_cols) gathered.elements[i] = from[col * src.col_stride];
      }
      ptx::st_shared_v4(to, gathered.words);
    }
  });
}

template <int bytes>
struct Words;
template <>
struct Words<16> {
  using type = uint4;
};
template <>
struct Words<8> {
  using type = uint2;
};
template <>
struct Words<4> {
  using type = u32;
};

// Rows [first_row, first_row + Tile::rows) of dst ← src; rows from row_limit on and columns from valid_cols on are not
// written. copy_bytes as for load.
template <int num_threads, int copy_bytes, int valid_cols, class Tile, class element>
inline void store(const tile::GlobalRows<element>& dst, const Tile& src, int first_row, int row_limit) {
  constexpr int valid_bytes = valid_cols * sizeof(element);
  for_each_chunk<num_threads>(src, dst, first_row, [&](element* to, int row, int chunk, u32 from) {
    if (row >= row_limit) return;
    union {
      element elements[Tile::chunk_elements];
      uint4 words;
    } held;
    held.words = ptx::ld_shared_v4(from);
    if constexpr (copy_bytes > sizeof(element) || copy_bytes == 16) {
      using Word = typename Words<copy_bytes>::type;
      static_assert(valid_bytes % copy_bytes == 0, "a row must be whole words");
#pragma unroll
      for (int i = 0; i < 16 / copy_bytes; ++i) {
        const int byte = chunk * 16 + i * copy_bytes;
        if (byte < valid_bytes) {
          *reinterpret_cast<Word*>(reinterpret_cast<char*>(to) + byte) = reinterpret_cast<const Word*>(&held)[i];
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < Tile::chunk_elements; ++i) {
        const int col = chunk * Tile::chunk_elements + i;
        if (col < valid_cols) to[col * dst.col_stride] = held.elements[i];
      }
    }
  });
}

}  // namespace block
