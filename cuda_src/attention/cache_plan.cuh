// attention: how the work on sequences in caches, whose lengths only the device knows, is divided evenly among thread
// blocks.
//
// An item (attention/split_schedule.cuh) is a tile of Config::block_m rows of a key head. It has a position for each of
// its blocks of keys, and one if it has none; or, with CacheParams::num_splits, one for each of so many parts of them.
// Items come sequence by sequence, in a sequence tile by tile, and in a tile head by head. Each thread block has
// equally many positions or, with num_splits, one or none.
#pragma once

#include "attention/block_range.cuh"
#include "attention/cache_params.cuh"
#include "attention/masks.cuh"
#include "attention/params.cuh"
#include "attention/seqlen.cuh"
#include "attention/split_schedule.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "tile/accumulator.cuh"

namespace attention {

struct alignas(16) PlannedSequence {
  i32 before;       // how many positions the sequences before it have
  i32 q_first_row;  // its first row in packed arrays
  i32 k_first_row;  // its first row in the cache that is a key
  i32 keys;         // rows from there on
};

struct alignas(16) PlannedBlock {
  EvenCut cut;  // of all positions; what follows is void if the block has none
  i32 batch;    // the sequence that has the first of its positions
  i32 q_rows;   // of that sequence
  PlannedSequence sequence;
};

// What plan memory holds: PlannedBlock by thread block, PlannedSequence by sequence and one behind the last, and the
// counters of thread blocks, see attention/forward_split_sm80.cuh. Where thread blocks divide the work themselves it
// holds the counters alone.
struct PlanMemory {
  PlannedBlock* blocks;
  PlannedSequence* sequences;
  i32* counters;

  PlanMemory(const Params& params, const CacheParams& cache)
      : blocks(reinterpret_cast<PlannedBlock*>(cache.plan)),
        sequences(reinterpret_cast<PlannedSequence*>(blocks + cache.plan_blocks)),
        counters(cache.divides ? cache.plan : reinterpret_cast<i32*>(sequences + params.batch + 1)) {}
};

// How many rows of q a sequence has, by its entry and the next.
template <class Config>
constexpr int rows_between(const Params& params, const PlannedSequence& sequence, const PlannedSequence& next) {
  return Config::varlen ? next.q_first_row - sequence.q_first_row : params.seqlen_q;
}

// How many tiles a key head of a sequence has.
template <class Config>
constexpr int tiles_of(const Params& params, int q_rows) {
  return ceil_div(q_rows * params.qheads_per_khead, Config::block_m);
}

// How many positions an item has.
template <class Config>
constexpr int item_positions(const Params& params, const CacheParams& cache, const Seqlen& seqlen, int m_block) {
  if (cache.num_splits > 0) return cache.num_splits;
  const BlockRange blocks = item_blocks<Config>(params, seqlen, m_block);
  return max_of(1, blocks.end - blocks.begin);
}

// How many positions a sequence has.
template <class Config>
constexpr int sequence_positions(const Params& params, const CacheParams& cache, const Seqlen& seqlen) {
  using Mask = typename Config::mask;
  const int heads = cache.num_heads_k, tiles = tiles_of<Config>(params, seqlen.q);
  if (cache.num_splits > 0 || (!Mask::hides_first && !Mask::hides_last)) {
    return tiles * heads * item_positions<Config>(params, cache, seqlen, 0);
  }
  int count = 0;
  for (int m_block = 0; m_block < tiles; ++m_block) count += item_positions<Config>(params, cache, seqlen, m_block);
  return count * heads;
}

// An item of a sequence, and where its positions are among those of the sequence.
struct SequenceItem {
  int m_block, head;
  int first, positions;
};

// The item of a position of a sequence.
template <class Config>
constexpr SequenceItem sequence_item(const Params& params, const CacheParams& cache, const Seqlen& seqlen,
                                     int position) {
  const int heads = cache.num_heads_k;
  if (cache.num_splits > 0) {
    const int item = u32(position) / u32(cache.num_splits), m_block = u32(item) / u32(heads);
    return {m_block, item - m_block * heads, item * cache.num_splits, cache.num_splits};
  }
  int before = 0;
  for (int m_block = 0;; ++m_block) {
    const int positions = item_positions<Config>(params, cache, seqlen, m_block);
    const int head = u32(position - before) / u32(positions);
    if (head < heads) return {m_block, head, before + head * positions, positions};
    before += positions * heads;
  }
}

// How long a sequence is, after what is appended.
template <class Config>
inline Seqlen cached_seqlen(const Params& params, const CacheParams& cache, int batch, int q_begin, int q_end) {
  const int q_rows = Config::varlen ? q_end - q_begin : params.seqlen_q;
  const int added = !cache.appends ? 0 : Config::varlen ? q_rows : cache.seqlen_new;
  const int rows = min_of(cached_rows(params, cache, batch) + added, params.seqlen_k);
  const int first = cache.cache_leftpad ? clamp(cache.cache_leftpad[batch * cache.cache_leftpad_stride], 0, rows) : 0;
  return {q_rows, rows - first, q_begin, first};
}

// The sum of what the lanes of a warp up to this one have, or the largest of it.
template <bool largest>
inline int scanned(int x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(0xffffffffu, x, step);
    if (int(tile::lane()) >= step) x = largest ? max_of(x, left) : x + left;
  }
  return x;
}

// The sum, or the largest, of what all threads of a block before this one have, and of what all of them have.
template <int threads, bool largest>
struct BlockScan {
  int before, all;

  static int combine(int a, int b) { return largest ? max_of(a, b) : a + b; }

  // All threads call this. `of_warps` is shared memory, of a number for each warp.
  BlockScan(int x, int* of_warps) {
    const int with_own = scanned<largest>(x);
    __syncthreads();  // every thread has read what the scan before has left
    if (tile::lane() == 31) of_warps[threadIdx.x / 32] = with_own;
    const int left = __shfl_up_sync(0xffffffffu, with_own, 1);
    before = tile::lane() == 0 ? 0 : left;
    __syncthreads();
    all = 0;
#pragma unroll
    for (int warp = 0; warp < threads / 32; ++warp) {
      if (warp == int(threadIdx.x / 32)) before = combine(all, before);
      all = combine(all, of_warps[warp]);
    }
  }
};

// Thread blocks that share so many positions. Seldom it is neither the most nor the least of them, which need no
// division.
constexpr int used_blocks(const CacheParams& cache, int positions) {
  if (likely(positions >= cache.plan_blocks * cache.least_positions)) return cache.plan_blocks;
  if (positions < cache.least_blocks * cache.least_positions) return cache.least_blocks;
  return u32(positions) / u32(cache.least_positions);
}

// Writes what all sequences have, and one entry behind the last, in turns in which each of `threads` has `each` of them
// side by side. Returns how many positions all have. All threads of a block call this; `of_warps` is as for BlockScan.
// A barrier has to follow before the entries are read.
template <class Config, int threads, int each>
inline int find_sequences(const Params& params, const CacheParams& cache, PlannedSequence* entries, int* of_warps) {
  int positions = 0, rows = 0;  // those of all sequences that were passed: rows are where the next begins in q
  for (int first = 0; first < params.batch; first += threads * each) {
    const int own = first + int(threadIdx.x) * each;
    // Packed sequences begin where the largest offset up to theirs says.
    int offsets[each + 1] = {};
    if constexpr (Config::varlen) {
#pragma unroll
      for (int i = 0; i <= each; ++i) {
        const int b = min_of(own + i, params.batch);
        offsets[i] = clamp(params.cu_seqlens_q[b * params.cu_seqlens_q_stride], 0, params.seqlen_q);
        if (i > 0) offsets[i] = max_of(offsets[i], offsets[i - 1]);
      }
      const BlockScan<threads, true> scan(offsets[each], of_warps);
#pragma unroll
      for (int i = 0; i <= each; ++i) offsets[i] = max_of(offsets[i], max_of(rows, scan.before));
      rows = max_of(rows, scan.all);
    }
    PlannedSequence sequences[each];
    int sum = 0;
#pragma unroll
    for (int i = 0; i < each; ++i) {
      sequences[i] = {sum, offsets[i], 0, 0};
      if (own + i >= params.batch) continue;
      const Seqlen seqlen = cached_seqlen<Config>(params, cache, own + i, offsets[i], offsets[i + 1]);
      sequences[i].k_first_row = seqlen.k_first_row;
      sequences[i].keys = seqlen.k;
      sum += sequence_positions<Config>(params, cache, seqlen);
    }
    const BlockScan<threads, false> scan(sum, of_warps);
#pragma unroll
    for (int i = 0; i < each; ++i) {
      sequences[i].before += positions + scan.before;
      if (own + i < params.batch) entries[own + i] = sequences[i];
    }
    positions += scan.all;
  }
  if (threadIdx.x == 0) entries[params.batch] = {positions, rows, 0, 0};
  return positions;
}

// Sets the counters of all thread blocks to 0. All threads of a block call this.
template <class Config>
inline void clear_counters(const Params& params, const CacheParams& cache) {
  const PlanMemory plan(params, cache);
  for (int i = threadIdx.x; i < cache.plan_blocks; i += Config::prepare_threads) plan.counters[i] = 0;
}

// Writes the plan; `each` is as for find_sequences. All threads of a block call this.
template <class Config, int each>
inline void make_plan(const Params& params, const CacheParams& cache) {
  constexpr int threads = Config::prepare_threads;
  __shared__ int of_warps[threads / 32];
  const PlanMemory plan(params, cache);
  clear_counters<Config>(params, cache);
  const int positions = find_sequences<Config, threads, each>(params, cache, plan.sequences, of_warps);

  const int used = used_blocks(cache, positions);
  const EvenCut cut{positions / used, positions % used};
  const int busy = min_of(positions, used);
  for (int i = busy + int(threadIdx.x); i < cache.plan_blocks; i += threads) {
    plan.blocks[i] = {{0, 0}, 0, 0, {0, 0, 0, 0}};
  }
  __syncthreads();  // all sequences are written
  // Where there are few sequences, several threads write what the thread blocks of one need.
  const int writers = max_of(1, threads / max_of(1, params.batch));
  for (int i = threadIdx.x; i < params.batch * writers; i += threads) {
    const int batch = i / writers;
    const PlannedSequence sequence = plan.sequences[batch], next = plan.sequences[batch + 1];
    const int q_rows = rows_between<Config>(params, sequence, next);
    const int first = sequence.before == 0 ? 0 : cut.part_of(sequence.before - 1) + 1;
    for (int block = first + i % writers; block < busy && cut.begin(block) < next.before; block += writers) {
      plan.blocks[block] = {cut, batch, q_rows, sequence};
    }
  }
}

}  // namespace attention
