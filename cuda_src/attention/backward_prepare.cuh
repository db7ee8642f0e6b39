// attention: the backward's kernel before the main one, which writes what that needs to know of each query row, and the
// zeros from which it counts and adds up. There is one thread block per tile of rows of the workspace, or, where tiles
// are small, per Config::row_tiles of them.
#pragma once

#include "attention/backward_params.cuh"
#include "attention/backward_work.cuh"
#include "attention/block_range.cuh"
#include "attention/masks.cuh"
#include "core/math.cuh"
#include "ptx/convert.cuh"
#include "tile/copy.cuh"

namespace attention {

// A tile of the workspace: rows [first_row, first_row + block_m) of the sequence, some or all of which may lie past its
// end, of one query head.
struct RowTile {
  int m_block, head, batch;
  int rank;  // packed: how many sequences before it have rows of q
  Seqlen seqlen;
  i64 row;             // row of the workspace where the tile begins; negative: there is no tile
  int workspace_rows;  // how many rows of the workspace, from `row` on, are the tile's

  // The tile of a unit. m_blocks: tiles of rows that a head has, unless packed. Tiles of a head go from last to first:
  // under a causal mask the last ones see most keys. Where sections have several query heads, these have all had a turn
  // before any has its next, so that the shortest come at the end of a section. Called by whole warps.
  template <class Config>
  static RowTile find(const BackwardParams& backward, int unit, int m_blocks, int heads_per_section = 1) {
    const Params& params = backward.forward;
    if (params.num_heads_q == 0) return none();
    if constexpr (Config::varlen) {
      return of_packed<Config>(backward, find_packed<Config>(backward, unit, heads_per_section));
    } else {
      if (m_blocks == 0) return none();
      if (heads_per_section == 1) {
        return of_dense<Config>(backward, {m_blocks - 1 - unit % m_blocks, unit / m_blocks});
      }
      // Units are numbered from the end, so that a last section with few heads, which would end unevenly, is first.
      const int heads = params.batch * params.num_heads_q, last = heads * m_blocks - 1;
      return of_dense<Config>(backward, unit_of(last - unit, m_blocks, heads, heads_per_section));
    }
  }

  // The same of packed sequences in two steps: a whole warp takes the first, and the second needs one thread.
  template <class Config>
  static PackedUnit find_packed(const BackwardParams& backward, int unit, int heads_per_section) {
    const Params& params = backward.forward;
    return packed_unit<Config::block_m>(unit, backward.offsets_q, params.batch, params.num_heads_q, heads_per_section);
  }

  template <class Config>
  static RowTile of_packed(const BackwardParams& backward, const PackedUnit& found) {
    if (found.units == 0) return none();
    RowTile tile;
    tile.m_block = found.units - 1 - found.place;
    tile.head = found.head;
    tile.batch = found.batch;
    tile.rank = backward.offsets_q[found.batch].rank;
    tile.seqlen = packed_seqlen(backward.forward, packed_sequence(backward, found.batch));
    tile.take_rows<Config>(backward);
    return tile;
  }

  // A tile of dense arrays, by its place in a head and its head among those of all sequences.
  template <class Config>
  static RowTile of_dense(const BackwardParams& backward, const UnitIndex& index) {
    RowTile tile;
    tile.rank = 0;
    tile.m_block = index.place;
    tile.head = index.head % backward.forward.num_heads_q;
    tile.batch = index.head / backward.forward.num_heads_q;
    tile.seqlen = dense_seqlen(backward.forward);
    tile.take_rows<Config>(backward);
    return tile;
  }

  // Finds where the tile's rows lie in the workspace, of which it has all the rest.
  template <class Config>
  void take_rows(const BackwardParams& backward) {
    RowTile& tile = *this;
    const int first_row = tile.m_block * Config::block_m;
    tile.row = workspace_row<Config>(backward, tile, tile.head) + first_row;
    tile.workspace_rows = Config::block_m;
    if (Config::varlen && first_row + Config::block_m >= tile.seqlen.q) {  // the last live tile has all the rest
      const int begin = tile.seqlen.q_first_row, rank = tile.rank;
      const int rows = padded_row<Config>(begin + tile.seqlen.q, rank + 1) - padded_row<Config>(begin, rank);
      tile.workspace_rows = first_row < tile.seqlen.q ? rows - first_row : 0;
    }
  }

  // How many units all heads and sequences have; packed, some units may have no tile.
  template <class Config>
  static int count(const BackwardParams& backward) {
    const Params& params = backward.forward;
    return params.m_blocks * params.num_heads_q * (Config::varlen ? 1 : params.batch);
  }

  static RowTile none() { return {0, 0, 0, 0, {0, 0, 0, 0}, -1, 0}; }

  // Which tile of dq_sum holds the sums of this tile.
  template <class Config>
  i64 sum_index(const BackwardParams& backward) const {
    if constexpr (!Config::varlen) return row / Config::block_m;
    return sum_tile<Config>(backward, *this, head, m_block);
  }

  // Where in dq_sum the sums of this tile begin.
  template <class Config>
  i64 sums(const BackwardParams& backward) const {
    if constexpr (!Config::varlen) return row * Config::tile_head_dim;
    if constexpr (!Config::sums_by_rows) return sum_index<Config>(backward) * (Config::block_m * Config::tile_head_dim);
    const i64 q_row = i64(head) * backward.forward.seqlen_q + seqlen.q_first_row + m_block * Config::block_m;
    return q_row * Config::tile_head_dim;
  }

  // Element 0 of the tile's first row in an array like q.
  template <class element>
  element* rows(element* pointer, const Strides& strides, int block_m) const {
    return pointer + batch * strides.batch + head * strides.head +
           (seqlen.q_first_row + i64(m_block) * block_m) * strides.seqlen;
  }
};

// The threads of a block that share a tile of rows: whole warps.
template <int block_threads, int row_tiles>
struct RowThreads {
  static constexpr int threads = block_threads / row_tiles;
  static_assert(threads % 32 == 0 && threads * row_tiles == block_threads, "tiles are shared by whole warps");

  static int thread() { return row_tiles == 1 ? threadIdx.x : threadIdx.x % threads; }
  static int unit() { return row_tiles == 1 ? blockIdx.x : blockIdx.x * row_tiles + threadIdx.x / threads; }

  // Whether there is such a unit. The last block may have fewer units than others.
  template <class Config>
  static bool live(const BackwardParams& backward) {
    return row_tiles == 1 || unit() < RowTile::count<Config>(backward);
  }
};

inline constexpr int prepare_threads = 256;  // the host launches as many

// Sets the counts that later kernels begin with to 0. The threads of a unit clear the counts that have its number.
template <class Config>
inline void begin_counts(const BackwardParams& backward, int unit, int thread) {
  if (thread != 0) return;
  const Params& forward = backward.forward;
  const int outer = Config::varlen ? 1 : forward.batch;
  if (unit == 0) *backward.next_unit = *backward.not_finite = 0;
  if (unit < RowTile::count<Config>(backward)) {
    backward.turns[unit] = 0;
    if (may_be_late<Config>) backward.turns[unit + backward.late_sums] = 0;
  }
  const int key_heads = forward.num_heads_q / forward.qheads_per_khead * outer;
  if constexpr (Config::part_blocks == 0) {
    if (unit < key_heads) backward.heads_done[unit] = 0;
  } else {  // of many keys and few queries there are more counts than units
    const int counts = key_heads * done_counts<Config>(backward), units = max_of(1, RowTile::count<Config>(backward));
    for (int i = unit; i < counts; i += units) backward.heads_done[i] = 0;
  }
}

// Writes the zeros from which a tile of dq adds up.
template <class Config>
inline void clear_sums(const BackwardParams& backward, const RowTile& tile, int thread, int threads) {
  const int first_row = tile.m_block * Config::block_m;
  const int rows = Config::sums_by_rows ? min_of(Config::block_m, tile.seqlen.q - first_row) : Config::block_m;
  uint4* const sums = reinterpret_cast<uint4*>(backward.dq_sum + tile.sums<Config>(backward));
  for (int i = thread; i < rows * Config::tile_head_dim / 4; i += threads) sums[i] = uint4{0, 0, 0, 0};
}

// Whether a score term hides a key from a query `row`.
template <class Config>
inline bool is_hidden(const Params& params, const Seqlen& seqlen, int batch, int query_head, int row, int key) {
  if constexpr (!Config::variant::hides) return false;
  const typename Config::variant variant(params, batch, query_head);
  return !variant.keeps({batch, query_head, row, key, float(row + seqlen.diagonal() - key), true, seqlen.diagonal()});
}

// Whether score terms hide keys [first_key, last_key] from a query `row` of a tile's head.
template <class Config>
inline bool are_hidden(const Params& params, const RowTile& tile, int row, int first_key, int last_key) {
  if constexpr (!Config::variant::hides) return false;
#pragma unroll 1
  for (int key = first_key; key <= last_key; ++key) {
    if (!is_hidden<Config>(params, tile.seqlen, tile.batch, tile.head, row, key)) return false;
  }
  return true;
}

// Each lane of a group of `lanes` has a part of `count` sums. Returns the whole of the sum that is the lane's.
template <int lanes, int count>
inline float sum_of_lanes(float (&sums)[count], int lane) {
  int step = 1;
#pragma unroll
  for (int half = count / 2; half > 0; half /= 2, step *= 2) {  // two lanes trade halves of what both have
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? sums[i] : sums[i + half], kept = upper ? sums[i + half] : sums[i];
      sums[i] = kept + __shfl_xor_sync(0xffffffffu, given, step);
    }
  }
#pragma unroll
  for (; step < lanes; step *= 2) sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], step);
  return sums[0];
}

// Which of `count` sums that is.
template <int count>
inline int sum_of_lane(int lane) {
  int sum = 0;
#pragma unroll
  for (int half = count / 2; half > 0; half /= 2, lane /= 2) sum += lane % 2 * half;
  return sum;
}

template <class Config>
inline void prepare_rows(const BackwardParams& backward, const RowTile& tile, int thread, int threads) {
  using element = typename Config::element;
  using Mask = typename Config::mask;
  constexpr int chunk_elements = 16 / sizeof(element), chunks = ceil_div(Config::head_dim_v, chunk_elements);
  constexpr int lanes = 8;  // lanes that share a row
  constexpr int lane_chunks = ceil_div(chunks, lanes);
  // Rows that a lane asks for before it waits for any: a power of 2, since what is known of them is then told of one
  // by each lane.
  constexpr int together = lane_chunks <= 1 ? 4 : lane_chunks <= 2 ? 2 : 1;
  union Chunk {
    uint4 words;
    element elements[chunk_elements];
  };
  const int live_rows = clamp(tile.seqlen.q - tile.m_block * Config::block_m, 0, Config::block_m);
  const int lane = thread % lanes, rows_apart = threads / lanes;
  const i64 out_step = rows_apart * backward.forward.out_strides.seqlen,
            dout_step = rows_apart * backward.dout_strides.seqlen;
  const element* out =
      tile.rows(static_cast<const element*>(backward.forward.out), backward.forward.out_strides, Config::block_m) +
      thread / lanes * backward.forward.out_strides.seqlen;
  const element* dout = tile.rows(static_cast<const element*>(backward.dout), backward.dout_strides, Config::block_m) +
                        thread / lanes * backward.dout_strides.seqlen;
  const float* const lse =
      tile.rows(static_cast<const float*>(backward.forward.lse), backward.lse_strides, Config::block_m);
  const float* const dlse = backward.dlse ? tile.rows(backward.dlse, backward.dlse_strides, Config::block_m) : nullptr;
  // A tile has a multiple of four rows of the workspace, and a warp four at a time: its lanes, which trade numbers, go
  // through the loop together.
#pragma unroll 1
  for (int first = thread / lanes; first < tile.workspace_rows; first += together * rows_apart) {
    Chunk a[together][lane_chunks], b[together][lane_chunks];
#pragma unroll
    for (int t = 0; t < together; ++t) {
      const bool live = first + t * rows_apart < live_rows;
#pragma unroll
      for (int c = 0; c < lane_chunks; ++c) {
        const int chunk = lane + c * lanes;
        a[t][c].words = b[t][c].words = uint4{0, 0, 0, 0};
        if (!live || chunk >= chunks) continue;
        a[t][c].words = tile::load_chunk<Config::out_copy_bytes, Config::head_dim_v, true>(
            out, backward.forward.out_strides.dim, chunk);
        b[t][c].words =
            tile::load_chunk<Config::copy_bytes, Config::head_dim_v>(dout, backward.dout_strides.dim, chunk);
      }
      out += out_step;
      dout += dout_step;
    }
    // Of the rows together, the one of which the lane knows lse and delta.
    const int row = first + sum_of_lane<together>(lane) * rows_apart;
    const bool live = row < live_rows;
    const float row_lse = live ? lse[row * backward.lse_strides.seqlen] * log2_e : -infinity;
    const float row_dlse = live && dlse ? dlse[row * backward.dlse_strides.seqlen] : 0.0f;
    float deltas[together];
#pragma unroll
    for (int t = 0; t < together; ++t) {
      deltas[t] = 0.0f;
#pragma unroll
      for (int c = 0; c < lane_chunks; ++c) {
#pragma unroll
        for (int i = 0; i < chunk_elements; ++i) {
          deltas[t] = fmaf(ptx::cvt_f32(a[t][c].elements[i]), ptx::cvt_f32(b[t][c].elements[i]), deltas[t]);
        }
      }
    }
    float delta = sum_of_lanes<lanes>(deltas, lane);
    if (lane >= together || row >= tile.workspace_rows) continue;
    // A row without keys, or whose scores are all -infinity, gets a row_lse of infinity: the scores less that are
    // -infinity, not NaN.
    const bool empty = row_lse == -infinity;
    const int own_row = tile.m_block * Config::block_m + row;
    const int first_key = Mask::first_key(backward.forward, tile.seqlen, own_row);
    const int last_key = Mask::last_key(backward.forward, tile.seqlen, own_row);
    // Of a row that sees no key only dlse counts, for the sink, whatever its dout holds. Terms are asked only where
    // that shows: out is 0 there, so that delta is 0 or NaN.
    if (first_key > last_key ||
        (delta != delta && are_hidden<Config>(backward.forward, tile, own_row, first_key, last_key))) {
      delta = 0.0f;
    }
    backward.row_lse[tile.row + row] = empty ? infinity : row_lse;
    backward.row_delta[tile.row + row] = empty ? 0.0f : delta - row_dlse;
  }
}

// Writes what packed tiles load for rows past the end of their sequence.
template <class Config>
inline void write_padding(const BackwardParams& backward) {
  if (!Config::varlen || blockIdx.x != 0 || threadIdx.x >= padding_rows) return;
  backward.row_lse[int(threadIdx.x) - padding_rows] = infinity;
  backward.row_delta[int(threadIdx.x) - padding_rows] = 0.0f;
}

// Writes the zeros from which gradients of score terms add up.
template <class Config>
inline void begin_terms(const BackwardParams& backward) {
  const i64 threads = i64(gridDim.x) * blockDim.x;
  Config::variant::begin(backward.forward.terms, i64(blockIdx.x) * blockDim.x + threadIdx.x, threads);
}

// The kernel before main kernels that write dq themselves.
template <class Config>
inline void prepare(const BackwardParams& backward) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *backward.not_finite = 0;
  if (blockIdx.x == 0 && threadIdx.x < unit_counts) backward.next_unit[threadIdx.x] = 0;
  begin_terms<Config>(backward);
  write_padding<Config>(backward);
  const RowTile tile = RowTile::find<Config>(backward, blockIdx.x, backward.forward.m_blocks);
  if (tile.row >= 0) prepare_rows<Config>(backward, tile, threadIdx.x, prepare_threads);
}

// The kernel before main kernels, such as Main, that add dq up in dq_sum.
template <class Config, class Main>
inline void prepare(const BackwardParams& backward) {
  using Threads = RowThreads<prepare_threads, Config::row_tiles>;
  const int unit = Threads::unit(), thread = Threads::thread();
  begin_counts<Config>(backward, unit, thread);
  begin_terms<Config>(backward);
  write_padding<Config>(backward);
  if (!Threads::template live<Config>(backward)) return;
  const RowTile tile = RowTile::find<Config>(backward, unit, backward.forward.m_blocks);
  if (tile.row < 0) return;
  if (!Main::first_stores && !writes_dq<Config>(tile.seqlen) && tile.m_block * Config::block_m < tile.seqlen.q) {
    clear_sums<Config>(backward, tile, thread, Threads::threads);
  }
  prepare_rows<Config>(backward, tile, thread, Threads::threads);
}

}  // namespace attention
