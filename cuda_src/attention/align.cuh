// attention: copies arrays whose rows are not aligned into rows that are, for kernels that read 16 bytes at a time.
// Threads write whole 16-byte chunks and read as wide as the array allows.
#pragma once

#include "attention/chunk_index.cuh"
#include "core/types.cuh"
#include "tile/copy.cuh"

namespace attention {

// Arrays of 16-bit elements, and their copies, whose rows are whole chunks. The chunks are counted along four axes, the
// fastest first; chunk_axes says which of them runs along a row. Steps are in elements. The host packs the same layout.
struct AlignParams {
  static constexpr int arrays = 4, axes = 4;

  const void* sources[arrays];
  void* copies[arrays];
  i64 source_steps[arrays][axes], copy_steps[arrays][axes];
  i64 column_strides[arrays];  // of the arrays; in a copy columns lie side by side
  i32 extents[arrays][axes];   // 0: there is no such array, nor one behind it
  i32 columns[arrays];         // columns of the arrays; columns of a copy behind them are zeros
  i32 chunk_axes[arrays];
  i32 copy_bytes[arrays];  // bytes that can be read at once; 2: single elements, with any column stride
};

// The first `columns` elements of a chunk, then zeros: the elements behind may be another array's, and are not read.
template <int copy_bytes>
inline uint4 load_columns(const u16* source, i64 column_stride, int columns) {
  constexpr int chunk_elements = 8;
  if constexpr (copy_bytes > 2) {
    if (columns >= chunk_elements) return tile::load_chunk<copy_bytes, chunk_elements>(source, 1, 0);
  }
  union {
    uint4 words;
    u16 elements[chunk_elements];
  } held;
#pragma unroll
  for (int i = 0; i < chunk_elements; ++i) held.elements[i] = i < columns ? source[i * column_stride] : u16(0);
  return held.words;
}

// Copies the chunks from `index` on, a `step` apart. side_by_side: whether the elements of a row lie side by side, as
// they do where copy_bytes hold more than one.
template <int copy_bytes, bool side_by_side>
inline void align_chunks(const AlignParams& params, int array, ChunkIndex index, const ChunkIndex& step) {
  const i32* const extents = params.extents[array];
#pragma unroll 1
  while (index.is_inside(extents)) {
    const int chunk = params.chunk_axes[array] == 0 ? index.along[0] : index.along[1];
    const uint4 words = load_columns<copy_bytes>(
        static_cast<const u16*>(params.sources[array]) + index.element(params.source_steps[array]),
        side_by_side ? 1 : params.column_strides[array], params.columns[array] - 8 * chunk);
    u16* const copy = static_cast<u16*>(params.copies[array]) + index.element(params.copy_steps[array]);
    *reinterpret_cast<uint4*>(copy) = words;
    index.advance(step, extents);
  }
}

template <class Config>
inline void align(const AlignParams& params) {
  static_assert(AlignParams::axes == ChunkIndex::axes);
  static_assert(Config::num_threads % 32 == 0, "whole warps, whose lanes read side by side");
  // Unrolled, so that what is known of an array is read where it is needed, and takes no registers.
#pragma unroll
  for (int array = 0; array < AlignParams::arrays; ++array) {
    if (params.extents[array][0] == 0) return;
    const ChunkIndex step(gridDim.x * Config::num_threads, params.extents[array]);
    const ChunkIndex index(blockIdx.x * Config::num_threads + threadIdx.x, params.extents[array]);
    switch (params.copy_bytes[array]) {
      case 16:
        align_chunks<16, true>(params, array, index, step);
        break;
      case 8:
        align_chunks<8, true>(params, array, index, step);
        break;
      case 4:
        align_chunks<4, true>(params, array, index, step);
        break;
      default:
        if (params.column_strides[array] == 1)
          align_chunks<2, true>(params, array, index, step);
        else
          align_chunks<2, false>(params, array, index, step);
    }
  }
}

}  // namespace attention
