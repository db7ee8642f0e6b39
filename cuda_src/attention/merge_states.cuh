// attention: merges states into that of all of their keys. row_lanes lanes have a row, of all states.
#pragma once

#include "attention/chunk_index.cuh"
#include "attention/states.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "tile/chunk.cuh"

namespace attention {

// Extents are those of lanes of a row, heads, rows and sequences; steps along lanes are those along chunks. The host
// packs the same layout.
struct MergeParams {
  States states;
  void* out;
  f32* lse;
  i64 out_steps[4], lse_steps[4];
  i32 extents[4];
  i32 chunks;  // of a row
  i32 rounds;  // in which all threads together have a part of all rows
};

// Most calls are so small that it counts how many instructions are fetched from memory: hence loops that are not
// unrolled, one lane that finds a state's weight for all, and divisions that a last round does without.
template <class Config>
inline void merge_states(const MergeParams& params) {
  using element = typename Config::element;
  using Chunk = tile::Chunk<Config::copy_bytes, element>;
  constexpr int lanes = Config::row_lanes;
  constexpr int ahead = min_of(4, lanes);  // states of which loads are under way at a time
  static_assert(32 % lanes == 0 && Config::num_threads % 32 == 0, "the lanes of a row are in one warp");
  const States& states = params.states;
  const int lane = int(threadIdx.x % lanes);
  ChunkIndex index(blockIdx.x * Config::num_threads + threadIdx.x, params.extents);
#pragma unroll 1
  for (int round = 0;; index.advance(ChunkIndex(gridDim.x * Config::num_threads, params.extents), params.extents)) {
    const bool is_there = index.is_inside(params.extents);
    RowStates<element> row(states, index);
    float lse = row.template lse_of_lane<lanes>(0, is_there);
    row.template weigh_together<lanes>(lse, is_there);
    element* out = static_cast<element*>(params.out) + index.element(params.out_steps);
    int chunk = 0;
    do {  // once, unless all lanes have a chunk
      const bool has_chunk = is_there && chunk + lane < params.chunks;
      const element *a = row.out_of_a(chunk), *b = row.out_of_b(chunk);
      Chunk merged{};
      float own = 0.0f;  // the weight of a lane's state, below 0 for those without keys, which are not read
#pragma unroll 1
      for (int first = 0; first < states.count; first += ahead) {
        if (first % lanes == 0) {
          if (first > 0 || chunk > 0) lse = row.template lse_of_lane<lanes>(first, is_there);
          own = lse == -infinity ? -1.0f : row.unnormalized(lse) / row.sum;
        }
        float weights[ahead];
        typename Chunk::Stored outs[ahead];
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
          weights[i] = __shfl_sync(0xffffffffu, own, first % lanes + i, lanes);
          outs[i] = {};
          if (has_chunk && !(weights[i] < 0.0f)) outs[i] = Chunk::fetch(row.is_b(first + i) ? b : a);
          a += states.out_state_step;
        }
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
          if (!(weights[i] < 0.0f)) merged.add(weights[i], Chunk::of(outs[i]));
        }
      }
      if (has_chunk) merged.store(out + chunk * params.out_steps[0]);
      chunk += lanes;
    } while (lanes == 32 && chunk < params.chunks);
    if (is_there && lane == 0) params.lse[index.row_element(params.lse_steps)] = row.merged_lse();
    if (++round == params.rounds) return;
  }
}

}  // namespace attention
