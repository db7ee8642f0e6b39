// attention: what a thread block of the backward works on: a block of keys of a key head, and the tiles of queries, of
// every query head that shares it, that see any of them.
#pragma once

#include "attention/backward_params.cuh"
#include "attention/block_range.cuh"
#include "attention/scheduler.cuh"
#include "attention/seqlen.cuh"
#include "core/math.cuh"

namespace attention {

// The query rows that see any of a block's keys, in tiles of Config::block_m.
struct QueryRange {
  int begin, end;            // tiles [begin, end) hold them all
  int full_begin, full_end;  // in tiles [full_begin, full_end) every row sees every key

  bool empty() const { return begin >= end; }
  bool is_boundary(int m_block) const { return m_block < full_begin || m_block >= full_end; }
};

template <class Config>
inline QueryRange query_range(const Params& params, const Seqlen& seqlen, int n_block) {
  constexpr int block_m = Config::block_m;
  const int first_key = n_block * Config::block_n, last_key = min_of(first_key + Config::block_n, seqlen.k) - 1;
  // Key j is seen by rows [j - diagonal - right, j - diagonal + left].
  int first_row = 0, first_full_row = 0, last_row = seqlen.q - 1, last_full_row = seqlen.q - 1;
  if constexpr (Config::causal || Config::window) {
    const int right = Config::window ? params.window_right : 0;
    first_row = max_of(0, first_key - seqlen.diagonal() - right);
    first_full_row = max_of(0, last_key - seqlen.diagonal() - right);
  }
  if constexpr (Config::window) {
    last_row = min_of(last_row, last_key - seqlen.diagonal() + params.window_left);
    last_full_row = min_of(last_full_row, first_key - seqlen.diagonal() + params.window_left);
  }
  QueryRange range;
  range.begin = first_row / block_m;
  range.end = last_key < first_key || last_row < first_row ? 0 : last_row / block_m + 1;
  range.full_begin = ceil_div(first_full_row, block_m);
  range.full_end = last_full_row < 0 ? 0 : (last_full_row + 1) / block_m;
  // Keys past the end of the sequence are masked in every tile. Rows past it need no mask: their row_lse sees to it.
  if (first_key + Config::block_n > seqlen.k)
    range.full_end = 0;
  else if (last_full_row == seqlen.q - 1)
    range.full_end = range.end;
  return range;
}

// Where a sequence's rows begin in a head of the workspace.
template <class Config>
inline int padded_row(const Seqlen& seqlen, int batch) {
  return Config::varlen ? first_packed_unit(seqlen.q_first_row, Config::block_m, batch) * Config::block_m : 0;
}

// The row of the workspace at which query head `head` of sequence `batch` begins.
template <class Config>
inline i64 workspace_row(const BackwardParams& params, const Seqlen& seqlen, int batch, int head) {
  const int outer = Config::varlen ? 0 : batch;
  return (i64(outer) * params.forward.num_heads_q + head) * params.workspace_rows + padded_row<Config>(seqlen, batch);
}

// Which of all sequences' key heads a query head reads.
inline int key_head(const Params& params, int batch, int query_head) {
  return (batch * params.num_heads_q + query_head) / params.qheads_per_khead;
}

// The deterministic order: how many blocks of keys add to a tile of dq before this one does. It is the order in which
// they are launched, so that nobody waits for one that cannot run.
template <class Config>
inline int turn_of(const BackwardParams& backward, const Seqlen& seqlen, int m_block, int n_block) {
  const BlockRange range = block_range<Config>(backward.forward, seqlen, m_block);
  return backward.reversed ? range.end - 1 - n_block : n_block - range.begin;
}

struct BackwardWork {
  int n_block, head, batch;  // head: of keys; n_block is negative where there is no more work
  Seqlen seqlen;
  int key_rows;  // rows of k and v that are the sequence's, live or not
  QueryRange range;

  // Whether the block lies past the end.
  template <class Config>
  bool idle() const {
    return n_block * Config::block_n >= key_rows;
  }

  // The first blocks of keys come first, unless reversed: under a causal mask they are seen by most queries.
  template <class Config>
  static BackwardWork find(const BackwardParams& backward, int unit) {
    const Params& params = backward.forward;
    const int heads = params.num_heads_q / params.qheads_per_khead;
    BackwardWork work;
    if constexpr (Config::varlen) {
      const auto offset = [&](int b) {
        return clamp(params.cu_seqlens_k[b * params.cu_seqlens_k_stride], 0, params.seqlen_k);
      };
      const PackedUnit found =
          packed_unit(unit, Config::block_n, params.batch, heads, params.heads_per_section, offset);
      work.n_block = backward.reversed && found.units > 0 ? found.units - 1 - found.row : found.row;
      work.head = found.head;
      work.batch = found.batch;
      work.key_rows = found.length;
      work.seqlen = varlen_seqlen(params, found.batch);
    } else {
      const UnitIndex index = unit_of(unit, backward.n_blocks, params.batch * heads, params.heads_per_section);
      work.n_block = backward.reversed ? backward.n_blocks - 1 - index.row : index.row;
      work.head = index.head % heads;
      work.batch = index.head / heads;
      work.key_rows = params.seqlen_k;
      work.seqlen = dense_seqlen(params);
    }
    work.range = query_range<Config>(params, work.seqlen, work.n_block);
    return work;
  }

  // Units of the launch; some may be idle.
  template <class Config>
  static int units(const BackwardParams& backward) {
    const Params& params = backward.forward;
    return backward.n_blocks * (params.num_heads_q / params.qheads_per_khead) * (Config::varlen ? 1 : params.batch);
  }
};

// Calls step(query head, tile of queries) for all that see the block's keys.
template <class Step>
inline void for_each_query_tile(const Params& params, const BackwardWork& work, Step&& step) {
  const int end = work.range.end;  // which is in shared memory
#pragma unroll 1
  for (int head = 0; head < params.qheads_per_khead; ++head) {
#pragma unroll 1
    for (int m_block = work.range.begin; m_block < end; ++m_block) {
      step(work.head * params.qheads_per_khead + head, m_block);
    }
  }
}

}  // namespace attention
