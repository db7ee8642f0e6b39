// attention: where the rows of a sequence lie in an array, and how a tile of them is loaded: by tensor copies, or
// through pointers. A main loop asks for rows by their place in the sequence and knows nothing else of where they are.
#pragma once

#include "attention/params.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
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
template <class Config, class Tile>
inline void load_rows(const Tile& to, const ptx::TensorMap& map, u32 barrier, int row, const MappedRows& from) {
  if constexpr (Config::varlen) {
    const int live = min_of(from.length - row, Tile::rows);
    tile::load(to, map, barrier, Tile::rows - live, from.head, from.first_row + row + live);
  } else {
    tile::load(to, map, barrier, row, from.head, from.batch);
  }
}

// The rows of a sequence in one head of an array that is read through pointers.
template <class element>
struct PointedRows {
  const element* pointer;  // where the sequence begins
  const Strides& strides;
  int length;  // how many rows are live
};

// Returns the thread's chunks of the tile that is to hold rows from `row` on, for load_chunks. Chunks that are found
// ahead of a barrier cost no time behind it.
template <class Config, class Tile>
inline auto find_chunks(const Tile& to, int row, const PointedRows<typename Config::element>& from) {
  using element = typename Config::element;
  const tile::GlobalRows<const element> rows{from.pointer, from.strides.seqlen, from.strides.dim};
  return block::Chunks<Config::num_threads, Config::copy_unroll, Tile, const element>(to, rows, row, from.length);
}

// The tile of the chunks ← their rows; rows past the end and columns from valid_cols on become zeros.
template <class Config, int valid_cols, class Chunks>
inline void load_chunks(const Chunks& chunks) {
  block::load<Config::copy_bytes, valid_cols>(chunks);
}

}  // namespace attention
