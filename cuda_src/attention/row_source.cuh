// attention: where the rows of a sequence lie in an array, and how a tile of them is loaded: by tensor copies, or
// through pointers. A main loop asks for rows by their place in the sequence and knows nothing else of where they are.
#pragma once

#include "attention/params.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/tma.cuh"
#include "tile/copy.cuh"
#include "tile/tensor_sm90.cuh"

namespace attention {

// The rows of a sequence in one head of an array that has a tensor map.
struct MappedRows {
  int length;     // how many rows are live
  int first_row;  // the row of the array with which the sequence begins; 0 unless sequences are packed
  int head, batch;
};

// to ← rows from `row` on; rows past the end become zeros. A packed sequence ends where its neighbour begins, whose
// rows may hold anything. The box therefore begins so far into the map's clipped rows, which are as many as the tile
// has, that only live rows come before their end: the rest of the box is zero-filled. One row at least must be live: a
// box that is clipped as a whole faults where the map's address, which lies before the array if sequences are packed,
// is not mapped.
template <class Config, class Tile, int box_rows = Tile::rows>
inline void load_rows(const Tile& to, const ptx::TensorMap& map, u32 barrier, int row, const MappedRows& from) {
  if constexpr (box_rows < Tile::rows) {
    static_assert(!Config::varlen, "a packed sequence ends within one box");
    tile::load_boxes<box_rows>(to, map, barrier, row, from.head, from.batch);
  } else if constexpr (Config::varlen) {
    const int live = min_of(from.length - row, Tile::rows);
    tile::load(to, map, barrier, Tile::rows - live, from.head, from.first_row + row + live);
  } else {
    tile::load(to, map, barrier, row, from.head, from.batch);
  }
}

// Rows that lie `step` apart, each from byte `byte` on: what `find` of a source of rows returns.
template <class element>
struct SteppedRows {
  const element* pointer;
  i64 step;
  int byte;

  const char* operator[](int index) const { return reinterpret_cast<const char*>(pointer + index * step) + byte; }
};

// What a source has looked up of where some rows are, if a pointer says that.
struct NoPlaces {};

// The rows of a sequence in one head of an array that is read through pointers.
template <class element>
struct PointedRows {
  const element* pointer;  // where the sequence begins
  const Strides& strides;
  int length;  // how many rows are live

  // Returns where byte `byte` of `count` rows is that lie `step` apart, from `row` on, whether they are live or not.
  template <int count, int step>
  SteppedRows<element> find(int row, int byte) const {
    return {at(row), step * strides.seqlen, byte};
  }

  template <int rows>
  NoPlaces look_up(int) const {
    return {};
  }
  template <int rows>
  const PointedRows& with(NoPlaces, int) const {
    return *this;
  }

  const element* at(int row) const { return pointer + row * strides.seqlen; }
};

// The rows of a tile that `ratio` heads share: row r is row r / ratio of head r % ratio.
template <class element>
struct SharedRows {
  const element* pointer;  // where the sequence begins in the first of the heads
  const Strides& strides;
  int length;
  int ratio;

  template <int count, int step>
  struct Found {
    const SharedRows& rows;
    int row, byte;

    const char* operator[](int index) const {
      return reinterpret_cast<const char*>(rows.at(row + index * step)) + byte;
    }
  };

  template <int count, int step>
  Found<count, step> find(int row, int byte) const {
    return {*this, row, byte};
  }

  const element* at(int row) const {
    const int query = u32(row) / u32(ratio);
    return pointer + query * strides.seqlen + (row - query * ratio) * strides.head;
  }
};

// Returns the thread's chunks of the tile that is to hold rows from `row` on, for load_chunks. Chunks that are found
// ahead of a barrier cost no time behind it.
template <class Config, class Tile>
inline auto find_chunks(const Tile& to, int row, const PointedRows<typename Config::element>& from) {
  using element = typename Config::element;
  const tile::GlobalRows<const element> rows{from.pointer, from.strides.seqlen, from.strides.dim};
  return block::Chunks<Config::num_threads, Config::copy_unroll, Config::copy_bytes, Tile, const element>(to, rows, row,
                                                                                                          from.length);
}

// The tile of the chunks ← their rows; rows past the end and columns from valid_cols on become zeros.
template <class Config, int valid_cols, class Chunks>
inline void load_chunks(const Chunks& chunks) {
  block::load<valid_cols>(chunks);
}

// to ← rows from `row` on, by thread `thread` of `threads`; rows past the end and columns from valid_cols on become
// zeros. `policy` is one of the L2, for asynchronous copies.
template <int threads, int copy_bytes, int valid_cols, class Tile, class Rows>
inline void copy_rows(const Tile& to, int row, const Rows& from, int thread, u64 policy) {
  using element = typename Tile::element;
  constexpr int rows_per_pass = threads / Tile::panel_chunks, passes = ceil_div(Tile::rows, rows_per_pass);
  constexpr int valid_bytes = valid_cols * int(sizeof(element));
  const int first = u32(thread) / Tile::panel_chunks, chunk = u32(thread) % Tile::panel_chunks;
  constexpr bool whole = valid_bytes % copy_bytes == 0 && (copy_bytes > sizeof(element) || copy_bytes == 16);
  const auto found = from.template find<passes, rows_per_pass>(row + first, whole ? chunk * 16 : 0);
  const u32 address = to.address(first, chunk);
  const int live = from.length - row - first;
  constexpr int unroll = copy_bytes == 16 ? passes : 1;  // short copies are many as it is
#pragma unroll unroll
  for (int pass = 0; pass < passes; ++pass) {
    const int step = pass * rows_per_pass;
    if (Tile::rows % rows_per_pass != 0 && first + step >= Tile::rows) return;
    const char* const own = found[pass];  // what `whole` copies add to it are constants
#pragma unroll
    for (int panel = 0; panel < Tile::panels; ++panel) {
      const u32 destination = Tile::template step_passes<rows_per_pass>(address, step) + panel * Tile::panel_stride;
      if constexpr (whole) {
#pragma unroll
        for (int byte = 0; byte < 16; byte += copy_bytes) {
          const int before = panel * Tile::panel_bytes + byte;
          const bool valid = before + Tile::panel_bytes <= valid_bytes || chunk * 16 + before < valid_bytes;
          // All or nothing takes a predicate, where any number of bytes takes half a dozen instructions.
          const int bytes = valid & (step < live) ? copy_bytes : 0;
          ptx::cp_async<copy_bytes>(destination + byte, own + before, bytes, policy);
        }
      } else {
        tile::copy_chunk<copy_bytes, valid_cols>(destination, reinterpret_cast<const element*>(own), from.strides.dim,
                                                 step < live, panel * Tile::panel_chunks + chunk, policy);
      }
    }
  }
}

}  // namespace attention
