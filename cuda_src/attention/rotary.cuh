// attention: rotary embedding of q and k. A thread has a chunk of a row, and turns it in several heads by the same
// angles.
#pragma once

#include "attention/chunk_index.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "tile/chunk.cuh"

namespace attention {

// The position of a row that is no packed sequence's: it stays as it is.
inline constexpr i32 no_position = -0x7fffffff - 1;

// Steps are along columns, heads, rows and sequences. Columns from rotary_dim on are not turned. A row has as many
// units as it has chunks or, where the columns of a pair are not in one chunk, as it has pairs of them and chunks that
// are not turned; units are extents[0], then come groups of heads, rows and sequences. The host packs the same layout.
struct RotaryParams {
  const void* q;
  const void* k;
  void* q_out;
  void* k_out;
  const void* cos;
  const void* sin;
  const i32* positions;   // null: rows have the positions from 0 on or, with offsets, from their sequence's on
  const i32* offsets;     // may be null
  const i32* cu_seqlens;  // where sequences are packed and not one, and then positions are null
  i32* row_positions;     // of rows of packed sequences, which the first kernel writes
  i64 q_steps[4], k_steps[4], q_out_steps[4], k_out_steps[4];
  i64 cos_strides[2], sin_strides[2];
  i64 positions_steps[4];
  i64 offsets_stride, cu_seqlens_stride;
  i32 extents[4];
  i32 num_heads_q, num_heads_k, heads_per_thread;
  i32 rotary_dim, rotated_units;
  i32 max_position;
  i32 rows, sequences;  // of packed sequences
  i32 floats;           // whether cos and sin are float32, whatever q is
  i32 inverse;
};

// A position, or the nearest one that the table has.
inline i32 in_table(const RotaryParams& params, i64 position) {
  return position < 0 ? 0 : position < params.max_position ? i32(position) : params.max_position - 1;
}

// The position of every row of packed sequences. Each offset is clamped to the packed array and counts as the largest
// up to it, as in attention/packed.cuh: so a row's sequence ends with the first offset that is larger than the row.
template <class Config>
inline void rotary_positions(const RotaryParams& params) {
  const int row = blockIdx.x * Config::num_threads + threadIdx.x;
  if (row >= params.rows) return;
  int begin = 0, end = 0;
  for (; end <= params.sequences; ++end) {
    const int offset = clamp(params.cu_seqlens[end * params.cu_seqlens_stride], 0, params.rows);
    if (offset > row) break;
    begin = max_of(begin, offset);
  }
  i32 position = no_position;
  if (0 < end && end <= params.sequences) {
    const i32 first = params.offsets == nullptr ? 0 : params.offsets[(end - 1) * params.offsets_stride];
    position = in_table(params, i64(first) + (row - begin));
  }
  params.row_positions[row] = position;
}

// The position of a row within the table, or `no_position`.
inline i32 position_of(const RotaryParams& params, const ChunkIndex& index) {
  const i64 row = index.along[2], sequence = index.along[3];
  if (params.cu_seqlens != nullptr) return params.row_positions[row];
  if (params.positions != nullptr) return in_table(params, params.positions[index.element(params.positions_steps)]);
  return in_table(params, row + (params.offsets == nullptr ? 0 : params.offsets[sequence * params.offsets_stride]));
}

// The pair of columns x and y, turned.
inline float2 turned(float x, float y, float cos, float sin) {
  return {fmaf(x, cos, -__fmul_rn(y, sin)), fmaf(y, cos, __fmul_rn(x, sin))};
}

// What a thread does with its chunk of a row in each head. size is that of a chunk, in elements.
template <class Config>
struct RotaryUnit {
  using element = typename Config::element;
  using Chunk = tile::Chunk<Config::copy_bytes, element>;
  static constexpr int size = Chunk::size;
  static constexpr bool within = Config::interleaved && size > 1;  // a chunk has whole pairs
  static constexpr int pairs = within ? size / 2 : size;

  int first, second;  // the columns of its chunks, the same if there is but one
  bool rotated;
  float cos[pairs], sin[pairs];

  RotaryUnit(const RotaryParams& params, int unit, i32 position) {
    rotated = unit < params.rotated_units;
    if (!rotated) {
      first = second = params.rotary_dim + (unit - params.rotated_units) * size;
      return;
    }
    if (within)
      first = second = unit * size;
    else if (Config::interleaved)
      first = 2 * unit, second = first + 1;
    else
      first = unit * size, second = first + params.rotary_dim / 2;
    rotated = position != no_position;
    if (!rotated) return;
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      cos[i] = number(params, params.cos, params.cos_strides, position, unit * pairs + i);
      sin[i] = number(params, params.sin, params.sin_strides, position, unit * pairs + i);
      if (params.inverse) sin[i] = -sin[i];
    }
  }

  static float number(const RotaryParams& params, const void* table, const i64* strides, i32 position, int pair) {
    const i64 at = position * strides[0] + pair * strides[1];
    return params.floats ? static_cast<const float*>(table)[at] : ptx::cvt_f32(static_cast<const element*>(table)[at]);
  }

  // A row of a head ← another, as far as the unit goes.
  void apply(const element* from, i64 from_step, element* to, i64 to_step) const {
    Chunk x = Chunk::load(from + first * from_step), y{};
    if (first != second) y = Chunk::load(from + second * from_step);
    if (rotated) {
#pragma unroll
      for (int i = 0; i < pairs; ++i) {
        float& one = within ? x.x[2 * i % size] : x.x[i];
        float& other = within ? x.x[(2 * i + 1) % size] : y.x[i];
        const float2 pair = turned(one, other, cos[i], sin[i]);
        one = pair.x, other = pair.y;
      }
    }
    x.store(to + first * to_step);
    if (first != second) y.store(to + second * to_step);
  }
};

template <class Config>
inline void rotary(const RotaryParams& params) {
  using element = typename Config::element;
  const ChunkIndex step(gridDim.x * Config::num_threads, params.extents);
  const int heads = params.num_heads_q + params.num_heads_k;
  const auto row_of = [](const ChunkIndex& index, const i64* steps) {
    return index.along[2] * steps[2] + index.along[3] * steps[3];
  };
#pragma unroll 1
  for (ChunkIndex index(blockIdx.x * Config::num_threads + threadIdx.x, params.extents);
       index.is_inside(params.extents); index.advance(step, params.extents)) {
    const RotaryUnit<Config> unit(params, index.along[0], position_of(params, index));
    const int first = index.along[1] * params.heads_per_thread;
#pragma unroll 1
    for (int head = first; head < min_of(first + params.heads_per_thread, heads); ++head) {
      const bool is_q = head < params.num_heads_q;
      const i64* const steps = is_q ? params.q_steps : params.k_steps;
      const i64* const out_steps = is_q ? params.q_out_steps : params.k_out_steps;
      const int own = is_q ? head : head - params.num_heads_q;
      unit.apply(
          static_cast<const element*>(is_q ? params.q : params.k) + (row_of(index, steps) + own * steps[1]), steps[0],
          static_cast<element*>(is_q ? params.q_out : params.k_out) + (row_of(index, out_steps) + own * out_steps[1]),
          out_steps[0]);
    }
  }
}

}  // namespace attention
