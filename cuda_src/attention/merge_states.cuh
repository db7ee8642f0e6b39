// attention: merges states into that of all of their keys. A thread has a chunk of a row, of all states.
#pragma once

#include "attention/chunk_index.cuh"
#include "attention/states.cuh"
#include "core/types.cuh"
#include "tile/chunk.cuh"

namespace attention {

// Extents are those of chunks of a row, heads, rows and sequences. The host packs the same layout.
struct MergeParams {
  States states;
  void* out;
  f32* lse;
  i64 out_steps[4], lse_steps[4];
  i32 extents[4];
};

template <class Config>
inline void merge_states(const MergeParams& params) {
  using element = typename Config::element;
  using Chunk = tile::Chunk<Config::copy_bytes, element>;
  const ChunkIndex step(gridDim.x * Config::num_threads, params.extents);
#pragma unroll 1
  for (ChunkIndex index(blockIdx.x * Config::num_threads + threadIdx.x, params.extents);
       index.is_inside(params.extents); index.advance(step, params.extents)) {
    const RowStates<element> row(params.states, index);
    Chunk merged{};
    for (int state = 0; state < params.states.count; state += 2) {  // two loads at a time
      bool live[2];
      Chunk out[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        live[i] = state + i < params.states.count && !row.is_empty(state + i);
        if (live[i]) out[i] = Chunk::load(row.out(state + i));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (live[i]) merged.add(row.weight(state + i), out[i]);
      }
    }
    merged.store(static_cast<element*>(params.out) + index.element(params.out_steps));
    if (index.along[0] == 0) params.lse[index.element(params.lse_steps)] = row.merged_lse();
  }
}

}  // namespace attention
