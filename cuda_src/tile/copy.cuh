// tile: block-wide copies between strided global memory and shared tiles.
#pragma once

#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/opaque.cuh"
#include "ptx/shared.cuh"
#include "ptx/thread.cuh"
#include "tile/shared.cuh"

namespace tile {

// Rows of one head in global memory; strides are in elements. col_stride is read only where elements are copied singly.
template <class element>
struct GlobalRows {
  element* pointer;
  i64 row_stride, col_stride;

  element* row(i64 index) const { return pointer + index * row_stride; }
};

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
template <>
struct Words<2> {
  using type = u16;
};

// Chunk `chunk` of a row in global memory, which has 16 or 8 bytes, ← words; columns from valid_cols on are not
// written. copy_bytes, or the whole chunk if it is smaller, are written at a time, or single elements with any
// col_stride.
template <int copy_bytes, int valid_cols, class element, class Chunk>
inline void store_chunk(element* row, i64 col_stride, int chunk, const Chunk& words) {
  constexpr int chunk_elements = sizeof(Chunk) / sizeof(element);
  union {
    Chunk words;
    element elements[chunk_elements];
  } held;
  held.words = words;
  if constexpr (copy_bytes > sizeof(element) || copy_bytes == 16) {
    constexpr int word_bytes = min_of(copy_bytes, sizeof(Chunk));
    using Word = typename Words<word_bytes>::type;
    constexpr int valid_bytes = valid_cols * sizeof(element);
    static_assert(valid_bytes % word_bytes == 0, "a row must be whole words");
#pragma unroll
    for (int i = 0; i < int(sizeof(Chunk)) / word_bytes; ++i) {
      const int byte = chunk * int(sizeof(Chunk)) + i * word_bytes;
      if (byte < valid_bytes) {
        *reinterpret_cast<Word*>(reinterpret_cast<char*>(row) + byte) = reinterpret_cast<const Word*>(&held)[i];
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < chunk_elements; ++i) {
      const int col = chunk * chunk_elements + i;
      if (col < valid_cols) row[col * col_stride] = held.elements[i];
    }
  }
}

// Where a thread writes chunks of 16 or 8 bytes of a row. A quad writes four side by side; the thread's is `first`
// after the one that `store` is asked for. Whole chunks go to an address that is computed once, plus what instructions
// hold; `first` is told again where a row may end among the four, so that it need not be held.
template <class Chunk, int copy_bytes, int valid_cols, class element>
struct RowWriter {
  static constexpr bool whole = copy_bytes >= sizeof(Chunk);
  static constexpr int chunk_elements = sizeof(Chunk) / sizeof(element);
  element* row;
  i64 col_stride;

  RowWriter(element* row, i64 col_stride, int first)
      : row(ptx::opaque(whole ? row + first * chunk_elements : row)), col_stride(col_stride) {}

  void store(int chunk, int first, const Chunk& words) const {
    if constexpr (whole) {
      const bool all_valid = (chunk + 4) * chunk_elements <= valid_cols;
      if (all_valid || (chunk + first) * chunk_elements < valid_cols) reinterpret_cast<Chunk*>(row)[chunk] = words;
    } else {
      store_chunk<copy_bytes, valid_cols>(row, col_stride, chunk + first, words);
    }
  }
};

// 16-byte chunk `chunk` of a row in global memory. Columns from valid_cols on become zeros and are never read: they may
// be another array's. Rows are aligned for copies of aligned_bytes, or elements are read singly, with any col_stride.
// What is read for the `last` time makes room in the caches for what is not.
template <int aligned_bytes, int valid_cols, bool last = false, class element>
inline uint4 load_chunk(const element* row, i64 col_stride, int chunk) {
  constexpr int chunk_elements = 16 / sizeof(element);
  constexpr int copy_bytes =
      max_of(int(sizeof(element)), common_power_of_2(aligned_bytes, valid_cols * sizeof(element)));
  union {
    uint4 words;
    element elements[chunk_elements];
  } held;
  held.words = uint4{0, 0, 0, 0};
  if constexpr (copy_bytes > sizeof(element) || copy_bytes == 16) {
    using Word = typename Words<copy_bytes>::type;
#pragma unroll
    for (int i = 0; i < 16 / copy_bytes; ++i) {
      const int byte = chunk * 16 + i * copy_bytes;
      if (byte < valid_cols * int(sizeof(element))) {
        const Word* const from = reinterpret_cast<const Word*>(reinterpret_cast<const char*>(row) + byte);
        if constexpr (last && copy_bytes == 16)
          reinterpret_cast<Word*>(&held)[i] = __ldcs(from);
        else
          reinterpret_cast<Word*>(&held)[i] = *from;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < chunk_elements; ++i) {
      const int col = chunk * chunk_elements + i;
      if (col < valid_cols) held.elements[i] = row[col * col_stride];
    }
  }
  return held.words;
}

// 16-byte chunk `chunk` of a row, to shared address `to`. A row that is not live, and columns from valid_cols on,
// become zeros and are never read. copy_bytes = sizeof(element) copies single elements, synchronously and with any
// col_stride; 4, 8 and 16 are asynchronous and need that alignment of every row and a col_stride of 1. `policy`, if
// any, is one of the L2, for asynchronous copies.
template <int copy_bytes, int valid_cols, class element, class... Policy>
inline void copy_chunk(u32 to, const element* row, i64 col_stride, bool live, int chunk, const Policy&... policy) {
  if constexpr (copy_bytes > sizeof(element) || copy_bytes == 16) {
    constexpr int valid_bytes = valid_cols * sizeof(element);
#pragma unroll
    for (int byte = 0; byte < 16; byte += copy_bytes) {
      const int valid = clamp(valid_bytes - (chunk * 16 + byte), 0, copy_bytes);
      ptx::cp_async<copy_bytes>(to + byte, reinterpret_cast<const char*>(row) + chunk * 16 + byte, live ? valid : 0,
                                policy...);
    }
  } else {
    constexpr int chunk_elements = 16 / sizeof(element);
    union {
      element elements[chunk_elements];
      uint4 words;
    } gathered;
    gathered.words = uint4{0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < chunk_elements; ++i) {
      const int col = chunk * chunk_elements + i;
      if (live && col < valid_cols) gathered.elements[i] = row[col * col_stride];
    }
    ptx::st_shared_v4(to, gathered.words);
  }
}

}  // namespace tile

namespace block {

// The 16-byte chunks of a tile that belong to this thread. Neighbouring lanes have neighbouring chunks of a row. Chunks
// that are found ahead of a barrier cost no time behind it. Copies of copy_bytes are asked for, as of tile::copy_chunk.
template <int num_threads, int unroll, int copy_bytes, class Tile_, class element>
struct Chunks {
  using Tile = Tile_;
  static constexpr int rows_per_pass = num_threads / Tile::panel_chunks;
  static_assert(rows_per_pass % 8 == 0 || 8 % rows_per_pass == 0, "the swizzle repeats every 8 rows");
  static constexpr bool whole = copy_bytes == 16;

  element* pointer;  // this thread's first row in global memory or, of whole chunks, the first chunk
  i64 row_stride, col_stride;
  u32 address;    // the thread's first chunk in shared memory
  int chunk;      // the column of that chunk, in chunks
  int rows_left;  // live rows from the thread's first row on

  // The tile holds rows [first_row, first_row + Tile::rows) of `rows`; rows from row_limit on are not live.
  Chunks(const Tile& tile, const tile::GlobalRows<element>& rows, int first_row, int row_limit) {
    const u32 thread = ptx::tid_x();
    const int row = thread / Tile::panel_chunks;
    chunk = thread % Tile::panel_chunks;
    pointer = rows.row(first_row + row);
    // Opaque, so that a pass adds a multiple of the stride, and does not find its row in the array anew.
    if constexpr (whole) pointer = ptx::opaque(pointer + chunk * Tile::chunk_elements);
    row_stride = rows.row_stride;
    col_stride = rows.col_stride;
    address = tile.address(row, chunk);
    rows_left = row_limit - first_row - row;
  }

  // Calls copy(pointer, whether the row is live, panel, address of the chunk), `unroll` passes over the rows at a time:
  // more passes are faster, until their addresses take the registers that the accumulators need. The pointer is that
  // of the row or, of whole chunks, that of the chunk.
  template <class Copy>
  void for_each(Copy&& copy) const {
#pragma unroll unroll
    for (int pass = 0; pass < ceil_div(Tile::rows, rows_per_pass); ++pass) {
      const int step = pass * rows_per_pass;
      if (Tile::rows % rows_per_pass != 0 && int(ptx::tid_x() / Tile::panel_chunks) + step >= Tile::rows) return;
      element* const from = pointer + step * row_stride;
#pragma unroll
      for (int panel = 0; panel < Tile::panels; ++panel) {
        copy(whole ? from + panel * Tile::panel_chunks * Tile::chunk_elements : from, step < rows_left, panel,
             Tile::template step_passes<rows_per_pass>(address, step) + panel * Tile::panel_stride);
      }
    }
  }

  // How many bytes of the thread's chunk of a panel lie before column valid_cols.
  template <int valid_cols>
  int valid_bytes(int panel) const {
    const int first = panel * Tile::panel_bytes, end = valid_cols * int(sizeof(element));
    if (first + Tile::panel_bytes <= end) return 16;
    const int left = end - first - chunk * 16;
    return end % 16 == 0 ? (left > 0 ? 16 : 0) : clamp(left, 0, 16);  // all or nothing takes fewer instructions
  }
};

// The tile of the chunks ← their rows, by tile::copy_chunk.
template <int valid_cols, int num_threads, int unroll, int copy_bytes, class Tile, class element>
inline void load(const Chunks<num_threads, unroll, copy_bytes, Tile, const element>& chunks) {
  chunks.for_each([&](const element* from, bool live, int panel, u32 to) {
    if constexpr (copy_bytes == 16) {
      ptx::cp_async<16>(to, from, live ? chunks.template valid_bytes<valid_cols>(panel) : 0);
    } else {
      tile::copy_chunk<copy_bytes, valid_cols>(to, from, chunks.col_stride, live,
                                               panel * Tile::panel_chunks + chunks.chunk);
    }
  });
}

// The rows of the chunks ← their tile; rows that are not live and columns from valid_cols on are not written.
template <int valid_cols, int num_threads, int unroll, int copy_bytes, class Tile, class element>
inline void store(const Chunks<num_threads, unroll, copy_bytes, Tile, element>& chunks) {
  chunks.for_each([&](element* to, bool live, int panel, u32 from) {
    if (!live) return;
    if constexpr (copy_bytes == 16) {
      if (chunks.template valid_bytes<valid_cols>(panel) == 16) *reinterpret_cast<uint4*>(to) = ptx::ld_shared_v4(from);
    } else {
      tile::store_chunk<copy_bytes, valid_cols>(to, chunks.col_stride, panel * Tile::panel_chunks + chunks.chunk,
                                                ptx::ld_shared_v4(from));
    }
  });
}

}  // namespace block
