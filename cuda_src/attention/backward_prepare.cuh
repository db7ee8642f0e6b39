// attention: what the backward needs to know of each query row before its main kernel, and where that adds up from.
// One thread block a tile of rows of the workspace.
#pragma once

#include "attention/backward_params.cuh"
#include "attention/backward_work.cuh"
#include "core/math.cuh"
#include "ptx/convert.cuh"
#include "tile/copy.cuh"

namespace attention {

// A tile of the workspace: rows [first_row, first_row + block_m) of the sequence, some or all of which may lie past its
// end, of one query head.
struct RowTile {
  int m_block, head, batch;
  Seqlen seqlen;
  i64 row;  // of the workspace, where the tile begins; negative: there is none

  // m_blocks: tiles of rows that a head has, unless packed.
  template <class Config>
  static RowTile find(const BackwardParams& backward, int unit, int m_blocks) {
    const Params& params = backward.forward;
    RowTile tile;
    if constexpr (Config::varlen) {
      const auto offset = [&](int b) {
        return clamp(params.cu_seqlens_q[b * params.cu_seqlens_q_stride], 0, params.seqlen_q);
      };
      const PackedUnit found = packed_unit(unit, Config::block_m, params.batch, params.num_heads_q, 1, offset);
      if (found.units == 0) return {0, 0, 0, {}, -1};
      tile.m_block = found.units - 1 - found.row;
      tile.head = found.head;
      tile.batch = found.batch;
      tile.seqlen = varlen_seqlen(params, found.batch);
    } else {
      if (m_blocks == 0) return {0, 0, 0, {}, -1};
      // From last to first: under a causal mask the last see most keys.
      tile.m_block = m_blocks - 1 - unit % m_blocks;
      tile.head = unit / m_blocks % params.num_heads_q;
      tile.batch = unit / m_blocks / params.num_heads_q;
      tile.seqlen = dense_seqlen(params);
    }
    tile.row = workspace_row<Config>(backward, tile.seqlen, tile.batch, tile.head) + tile.m_block * Config::block_m;
    return tile;
  }

  // Element 0 of the tile's first row in an array like q.
  template <class element>
  element* rows(element* pointer, const Strides& strides, int block_m) const {
    return pointer + batch * strides.batch + head * strides.head +
           (seqlen.q_first_row + i64(m_block) * block_m) * strides.seqlen;
  }
};

// Nobody has done anything yet. A thread block sets to 0 what has its number: all of it, whichever tiles cu_seqlens
// that decrease leave out, or a main kernel would wait for what was there before.
template <class Config>
inline void begin_counts(const BackwardParams& params) {
  if (threadIdx.x != 0) return;
  const Params& forward = params.forward;
  const int outer = Config::varlen ? 1 : forward.batch, block = blockIdx.x;
  if (block == 0) *params.next_unit = 0;
  if (block < forward.m_blocks * forward.num_heads_q * outer) params.turns[block] = 0;
  if (block < forward.num_heads_q / forward.qheads_per_khead * outer) params.heads_done[block] = 0;
}

// Zeros where dq adds up.
template <class Config>
inline void clear_sums(const BackwardParams& params, const RowTile& tile) {
  uint4* const sums = reinterpret_cast<uint4*>(params.dq_sum + tile.row * Config::tile_head_dim);
  for (int i = threadIdx.x; i < Config::block_m * Config::tile_head_dim / 4; i += blockDim.x) {
    sums[i] = uint4{0, 0, 0, 0};
  }
}

template <class Config>
inline void prepare_rows(const BackwardParams& params, const RowTile& tile) {
  using element = typename Config::element;
  constexpr int chunk_elements = 16 / sizeof(element), chunks = ceil_div(Config::head_dim_v, chunk_elements);
  constexpr int lanes = 8;  // that share a row
  const int live_rows = clamp(tile.seqlen.q - tile.m_block * Config::block_m, 0, Config::block_m);
  const element* const out =
      tile.rows(static_cast<const element*>(params.forward.out), params.forward.out_strides, Config::block_m);
  const element* const dout = tile.rows(static_cast<const element*>(params.dout), params.dout_strides, Config::block_m);
  const float* const lse =
      tile.rows(static_cast<const float*>(params.forward.lse), params.lse_strides, Config::block_m);
  const float* const dlse = params.dlse ? tile.rows(params.dlse, params.dlse_strides, Config::block_m) : nullptr;
  const int lane = threadIdx.x % lanes;
  for (int row = threadIdx.x / lanes; row < Config::block_m; row += blockDim.x / lanes) {
    const bool live = row < live_rows;
    float delta = 0.0f;
#pragma unroll
    for (int chunk = lane; live && chunk < chunks; chunk += lanes) {
      union {
        uint4 words;
        element elements[chunk_elements];
      } a, b;
      a.words = tile::load_chunk<Config::copy_bytes, Config::head_dim_v>(out + row * params.forward.out_strides.seqlen,
                                                                         params.forward.out_strides.dim, chunk);
      b.words = tile::load_chunk<Config::copy_bytes, Config::head_dim_v>(dout + row * params.dout_strides.seqlen,
                                                                         params.dout_strides.dim, chunk);
#pragma unroll
      for (int i = 0; i < chunk_elements; ++i)
        delta = fmaf(ptx::cvt_f32(a.elements[i]), ptx::cvt_f32(b.elements[i]), delta);
    }
#pragma unroll
    for (int step = 1; step < lanes; step *= 2) delta += __shfl_xor_sync(0xffffffffu, delta, step);
    if (lane == 0) {
      float row_lse = infinity;
      if (live) {
        row_lse = lse[row * params.lse_strides.seqlen] * log2_e;
        // A row that sees no key: its scores are all -infinity, and so would their differences be, not NaN.
        if (row_lse == -infinity) row_lse = infinity;
        if (dlse) delta -= dlse[row * params.dlse_strides.seqlen];
      }
      params.row_lse[tile.row + row] = row_lse;
      params.row_delta[tile.row + row] = row_lse == infinity ? 0.0f : delta;
    }
  }
}

// For main kernels that write dq themselves.
template <class Config>
inline void prepare(const BackwardParams& params) {
  const RowTile tile = RowTile::find<Config>(params, blockIdx.x, params.forward.m_blocks);
  if (tile.row >= 0) prepare_rows<Config>(params, tile);
}

// For those, such as Main, that add it up in dq_sum.
template <class Config, class Main>
inline void prepare(const BackwardParams& params) {
  begin_counts<Config>(params);
  const RowTile tile = RowTile::find<Config>(params, blockIdx.x, params.forward.m_blocks);
  if (tile.row < 0) return;
  if (!Main::first_stores && tile.m_block * Config::block_m < tile.seqlen.q) clear_sums<Config>(params, tile);
  prepare_rows<Config>(params, tile);
}

}  // namespace attention
