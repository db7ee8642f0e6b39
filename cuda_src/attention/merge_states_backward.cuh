// attention: the gradients of merged states by the states. row_lanes lanes have a row, of all states.
//
// With w_s the weight of state s and delta_s = dout · out_s, dout_s = w_s dout and
// dlse_s = w_s (delta_s - (sum over r of w_r delta_r) + dlse).
#pragma once

#include "attention/chunk_index.cuh"
#include "attention/states.cuh"
#include "core/types.cuh"
#include "tile/chunk.cuh"

namespace attention {

// dout_a and so on lie as the states do, but contiguous. Extents are those of lanes of a row, heads, rows and
// sequences; steps along lanes are those along chunks. dlse may be null. The host packs the same layout.
struct MergeBackwardParams {
  States states;
  const void* dout;
  const f32* dlse;
  void* dout_a;
  void* dout_b;
  f32* dlse_a;
  f32* dlse_b;
  i64 dout_steps[4], dlse_steps[4];
  i64 dstates_steps[4], dlse_states_steps[4];
  i64 dout_state_step, dlse_state_step;
  i32 extents[4];
  i32 chunks;  // of a row
};

// The sum of x over the lanes of a row, for each of them.
template <int lanes>
inline float row_sum(float x) {
  const u32 first = threadIdx.x % 32 / lanes * lanes;
  const u32 mask = (lanes == 32 ? 0xffffffffu : (1u << lanes) - 1) << first;
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(mask, x, step);
  return x;
}

template <class Config>
inline void merge_states_backward(const MergeBackwardParams& params) {
  using element = typename Config::element;
  using Chunk = tile::Chunk<Config::copy_bytes, element>;
  constexpr int lanes = Config::row_lanes;
  static_assert(32 % lanes == 0 && Config::num_threads % 32 == 0, "the lanes of a row are in one warp");
  const ChunkIndex step(gridDim.x * Config::num_threads, params.extents);
#pragma unroll 1
  for (ChunkIndex index(blockIdx.x * Config::num_threads + threadIdx.x, params.extents);
       index.is_inside(params.extents); index.advance(step, params.extents)) {
    RowStates<element> row(params.states, index);
    row.weigh();
    const element* const dout = static_cast<const element*>(params.dout) + index.element(params.dout_steps);
    const i64 dstate = index.element(params.dstates_steps), dlse_state = index.element(params.dlse_states_steps);
    const bool first = index.along[0] == 0;
    float mean = 0.0f;
    for (int state = 0; state < params.states.count; ++state) {
      const bool empty = row.is_empty(state), is_b = row.is_b(state);
      const float weight = row.weight(state);
      element* const dout_state =
          is_b ? static_cast<element*>(params.dout_b) + dstate
               : static_cast<element*>(params.dout_a) + (dstate + state * params.dout_state_step);
      float delta = 0.0f;
      for (int chunk = index.along[0]; chunk < params.chunks; chunk += lanes) {
        const int offset = chunk - int(index.along[0]);
        Chunk gradient{};
        if (!empty) {
          gradient = Chunk::load(dout + offset * params.dout_steps[0]);
          const Chunk out = Chunk::load(row.out(state, offset));
#pragma unroll
          for (int i = 0; i < Chunk::size; ++i) {
            delta = fmaf(gradient.x[i], out.x[i], delta);
            gradient.x[i] *= weight;
          }
        }
        gradient.store(dout_state + offset * params.dstates_steps[0]);
      }
      delta = row_sum<lanes>(delta);
      if (!empty) mean = fmaf(weight, delta, mean);
      if (first) (is_b ? params.dlse_b : params.dlse_a + state * params.dlse_state_step)[dlse_state] = delta;
    }
    if (!first) continue;
    const float dlse = params.dlse == nullptr ? 0.0f : params.dlse[index.element(params.dlse_steps)];
    for (int state = 0; state < params.states.count; ++state) {
      f32* const delta =
          (row.is_b(state) ? params.dlse_b : params.dlse_a + state * params.dlse_state_step) + dlse_state;
      *delta = row.is_empty(state) ? 0.0f : row.weight(state) * (*delta - mean + dlse);
    }
  }
}

}  // namespace attention
