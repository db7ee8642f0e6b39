// attention: what is left to do after the backward's main kernel: dq in its dtype, the sinks' gradients, and zeros for
// rows that are no sequence's. There is one thread block per tile of rows of the workspace, or, where tiles are small,
// per Config::row_tiles of them, then one per head.
#pragma once

#include "attention/backward_params.cuh"
#include "attention/backward_prepare.cuh"
#include "attention/backward_rows.cuh"
#include "attention/backward_work.cuh"
#include "attention/exact_sums.cuh"
#include "core/math.cuh"
#include "ptx/math.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// Loads a thread's part of a tile of dq_sum. Main, the struct of the main kernel, says how it orders the numbers:
// groups of dq_group threads come one after the other; in a group, each vector (t, j, i / dq_vector) of fragments comes
// once for every thread, side by side.
template <class Main>
inline void load_dq(typename Main::Dq& dq, const float* sums, int thread) {
  constexpr int vector = Main::dq_vector, group = Main::dq_group;
  sums += thread / group * (group * Main::Dq::m_tiles * Main::Dq::n_tiles * 4) + thread % group * vector;
#pragma unroll
  for (int t = 0; t < Main::Dq::m_tiles; ++t) {
#pragma unroll
    for (int j = 0; j < Main::Dq::n_tiles; ++j) {
      const float* const from = sums + (t * Main::Dq::n_tiles + j) * 4 * group;
      if constexpr (vector == 4) {
        const float4 x = __ldcg(reinterpret_cast<const float4*>(from));
        dq.x[t][j][0] = x.x;
        dq.x[t][j][1] = x.y;
        dq.x[t][j][2] = x.z;
        dq.x[t][j][3] = x.w;
      } else {
        static_assert(vector == 1, "a vector is of one or four numbers");
#pragma unroll
        for (int i = 0; i < 4; ++i) dq.x[t][j][i] = from[i * group];
      }
    }
  }
}

// The same where sums are in the order of the rows, of which the first live_rows are live.
template <class Config, class Main>
inline void load_dq_rows(typename Main::Dq& dq, const float* sums, int live_rows, int thread) {
#pragma unroll
  for (int t = 0; t < Main::Dq::m_tiles; ++t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = Main::dq_row(thread) + tile::fragment_row(t, i);
      const float* const from = sums + row * Config::tile_head_dim + Main::dq_col(thread) + tile::fragment_col();
#pragma unroll
      for (int j = 0; j < Main::Dq::n_tiles; ++j) {
        const float2 x = row < live_rows ? *reinterpret_cast<const float2*>(from + 8 * j) : float2{0.0f, 0.0f};
        dq.x[t][j][2 * i] = x.x;
        dq.x[t][j][2 * i + 1] = x.y;
      }
    }
  }
}

// Adds what late blocks (is_late) have added up for a tile, if any did. `added` is whether `dq` has numbers, before and
// after.
template <class Config, class Main>
inline void add_late_sums(const BackwardParams& backward, typename Main::Dq& dq, const RowTile& tile, bool& added,
                          int thread) {
  using Dq = typename Main::Dq;
  const i64 index = tile.template sum_index<Config>(backward) + backward.late_sums;
  if (__ldcg(backward.turns + index) == 0) return;
  Dq late;
  load_dq<Main>(late, backward.dq_sum + index * (Config::block_m * Config::tile_head_dim), thread);
#pragma unroll
  for (int t = 0; t < Dq::m_tiles; ++t) {
#pragma unroll
    for (int j = 0; j < Dq::n_tiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dq.x[t][j][i] = added ? dq.x[t][j][i] + late.x[t][j][i] : late.x[t][j][i];
    }
  }
  added = true;
}

// Main::dq_threads threads write dq of some tiles of rows. The loads of all tiles are on their way before the first is
// waited for. A tile with a negative row is left out.
template <class Config, class Main, int count>
inline void finish_tiles(const BackwardParams& backward, const RowTile (&tiles)[count], int thread) {
  using element = typename Config::element;
  using Dq = typename Main::Dq;
  Dq dq[count];
  bool added[count];  // whether anybody has added to the tile
#pragma unroll
  for (int each = 0; each < count; ++each) {
    const RowTile& tile = tiles[each];
    if (tile.row < 0) continue;
    added[each] = !Main::first_stores || __ldcg(backward.turns + tile.template sum_index<Config>(backward)) != 0;
    const float* const sums = backward.dq_sum + tile.template sums<Config>(backward);
    if constexpr (Config::sums_by_rows)
      load_dq_rows<Config, Main>(dq[each], sums, tile.seqlen.q - tile.m_block * Config::block_m, thread);
    else
      load_dq<Main>(dq[each], sums, thread);
  }
  if (may_be_late<Config> && Main::first_stores && backward.late_sums > 0) {
#pragma unroll
    for (int each = 0; each < count; ++each) {
      if (tiles[each].row >= 0) add_late_sums<Config, Main>(backward, dq[each], tiles[each], added[each], thread);
    }
  }
#pragma unroll
  for (int each = 0; each < count; ++each) {
    const RowTile& tile = tiles[each];
    if (tile.row < 0) continue;
    const int live_rows = tile.seqlen.q - tile.m_block * Config::block_m;
    NotFinite<f32> not_finite;
    const float factor = added[each] ? backward.forward.softmax_scale : 0.0f;  // 0: no row sees a key
    element* const rows = tile.rows(static_cast<element*>(backward.dq), backward.dq_strides, Config::block_m);
#pragma unroll
    for (int t = 0; t < Dq::m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = Main::dq_row(thread) + tile::fragment_row(t, i);
        write_row<Config::store_bytes, Config::head_dim>(rows + row * backward.dq_strides.seqlen,
                                                         backward.dq_strides.dim, row < live_rows, dq[each], t, i,
                                                         factor, not_finite, Main::dq_col(thread));
      }
    }
    if (unlikely(added[each] && not_finite.found())) *backward.not_finite = 1;
  }
}

// Writes zeros to the live rows of a tile of dq that the main kernel would have written if they saw a key.
template <class Config>
inline void clear_rows(const BackwardParams& backward, const RowTile& tile, int thread, int threads) {
  using element = typename Config::element;
  constexpr int chunks = ceil_div(Config::head_dim * int(sizeof(element)), 16);
  const int rows = min_of(Config::block_m, tile.seqlen.q - tile.m_block * Config::block_m);
  element* const to = tile.rows(static_cast<element*>(backward.dq), backward.dq_strides, Config::block_m);
  for (int i = thread; i < rows * chunks; i += threads) {
    tile::store_chunk<Config::store_bytes, Config::head_dim>(to + i / chunks * backward.dq_strides.seqlen,
                                                             backward.dq_strides.dim, i % chunks, uint4{0, 0, 0, 0});
  }
}

// Writes the gradient of a head's sink, whose probability in row i is p = exp(sink - lse): -Σ p · delta.
template <class Config>
inline void finish_sink(const BackwardParams& backward, int head) {
  const Params& params = backward.forward;
  const float sink = params.sinks[head * params.sinks_stride] * log2_e;
  const int outer = Config::varlen ? 1 : params.batch;
  i64 begin = 0, end = backward.workspace_rows;
  if (Config::varlen) {  // rows of the workspace before the first sequence and past the last hold nothing
    const PackedOffset first = backward.offsets_q[0], last = backward.offsets_q[params.batch];
    begin = padded_row<Config>(first.row, first.rank);
    end = padded_row<Config>(last.row, last.rank);
  }
  float sum = 0.0f;
  const i64 rows = end - begin;  // of all sequences together, since one may have few
#pragma unroll 4
  for (i64 i = threadIdx.x; i < outer * rows; i += blockDim.x) {
    const i64 b = i / rows, row = (b * params.num_heads_q + head) * backward.workspace_rows + begin + i - b * rows;
    const float row_lse = backward.row_lse[row];
    const float p = sink == row_lse ? 1.0f : ptx::ex2_approx_ftz(sink - row_lse);  // both may be infinite
    sum -= p == 0.0f ? 0.0f : p * backward.row_delta[row];
  }
  __shared__ float sums[32];
#pragma unroll
  for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (int w = 0; w < int(blockDim.x / 32); ++w) total += sums[w];
    backward.dsinks[head] = total;
  }
}

// Writes zeros to the rows of a packed gradient that no sequence has.
template <class Config, int valid_cols>
inline void clear_outside(void* gradient, const Strides& strides, int heads, int total, int begin, int end) {
  using element = typename Config::element;
  constexpr int chunks = ceil_div(valid_cols * int(sizeof(element)), 16);
  const int rows = begin + total - end;
  for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < i64(rows) * heads * chunks;
       i += i64(gridDim.x) * blockDim.x) {
    const int chunk = i % chunks, head = i / chunks % heads;
    const int index = i / chunks / heads, row = index < begin ? index : index - begin + end;
    tile::store_chunk<Config::store_bytes, valid_cols>(
        static_cast<element*>(gradient) + row * strides.seqlen + head * strides.head, strides.dim, chunk,
        uint4{0, 0, 0, 0});
  }
}

template <class Config>
inline void clear_outside(const BackwardParams& backward) {
  const Params& params = backward.forward;
  const int q_begin = backward.offsets_q[0].row, q_end = backward.offsets_q[params.batch].row;
  const int k_begin = backward.offsets_k[0].row, k_end = backward.offsets_k[params.batch].row;
  const int heads_k = params.num_heads_q / params.qheads_per_khead;
  clear_outside<Config, Config::head_dim>(backward.dq, backward.dq_strides, params.num_heads_q, params.seqlen_q,
                                          q_begin, q_end);
  clear_outside<Config, Config::head_dim>(backward.dk, backward.dk_strides, heads_k, params.seqlen_k, k_begin, k_end);
  clear_outside<Config, Config::head_dim_v>(backward.dv, backward.dv_strides, heads_k, params.seqlen_k, k_begin, k_end);
}

// The kernel behind main kernels that write dq themselves: one thread block per head, if there are sinks.
template <class Config>
inline void finish(const BackwardParams& backward) {
  if (Config::varlen) clear_outside<Config>(backward);
  if (Config::sinks && int(blockIdx.x) < backward.forward.num_heads_q) finish_sink<Config>(backward, blockIdx.x);
}

// The kernel behind main kernels, such as Main, that leave dq in dq_sum.
template <class Config, class Main>
inline void finish(const BackwardParams& backward) {
  static_assert(Config::dq_threads == Main::dq_threads, "Config and the main kernel disagree on threads");
  using Threads = RowThreads<Config::dq_threads * Config::row_tiles, Config::row_tiles>;
  const int tiles = gridDim.x - (Config::sinks ? backward.forward.num_heads_q : 0);  // or groups of tiles
  if (Config::varlen) clear_outside<Config>(backward);
  if (Config::sinks && int(blockIdx.x) >= tiles) return finish_sink<Config>(backward, blockIdx.x - tiles);
  if (!Threads::template live<Config>(backward)) return;
  const RowTile tile[] = {RowTile::find<Config>(backward, Threads::unit(), backward.forward.m_blocks)};
  const int m_block = tile[0].m_block;
  if (m_block * Config::block_m >= tile[0].seqlen.q) return;  // no row of the tile is live
  if (!writes_dq<Config>(tile[0].seqlen)) return finish_tiles<Config, Main>(backward, tile, Threads::thread());
  const int head = tile[0].head / backward.forward.qheads_per_khead;
  const auto written = query_tiles<Config>(backward.forward, tile[0].seqlen, tile[0].batch, head, 0);
  if (written.contains(m_block)) return;
  clear_rows<Config>(backward, tile[0], Threads::thread(), Threads::threads);
}

// The kernel behind the main ones for score terms whose gradients have to be made of what was added up.
template <class Config>
inline void backward_terms(const BackwardArgument& argument) {
  const i64 threads = i64(gridDim.x) * blockDim.x;
  Config::variant::finish(argument.params.forward.terms, i64(blockIdx.x) * blockDim.x + threadIdx.x, threads);
}

}  // namespace attention
