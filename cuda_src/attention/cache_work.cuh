// attention: what a thread block of the forward over caches works on: tiles of query rows of sequences that are as long
// as a plan says.
#pragma once

#include "attention/cache_params.cuh"
#include "attention/cache_plan.cuh"
#include "attention/cache_rows.cuh"
#include "attention/params.cuh"
#include "attention/row_source.cuh"
#include "attention/seqlen.cuh"
#include "attention/split_schedule.cuh"
#include "attention/split_work.cuh"
#include "core/math.cuh"
#include "ptx/thread.cuh"

namespace attention {

// What keys and values of a tile are to be multiplied by: nothing but those in e4m3.
template <class kv_element>
struct TileDescales {
  static constexpr float k_descale() { return 1.0f; }
  static constexpr float v_descale() { return 1.0f; }
  void take(const CacheParams&, int, int) {}
};

template <>
struct TileDescales<e4m3> {
  float of_k, of_v;

  float k_descale() const { return of_k; }
  float v_descale() const { return of_v; }
  void take(const CacheParams& cache, int sequence, int key_head) {
    of_k = attention::k_descale(cache, sequence, key_head);
    of_v = attention::v_descale(cache, sequence, key_head);
  }
};

// A tile of a sequence in a cache.
template <class Config>
struct CacheTile : SharedTile<Config>, TileDescales<typename Config::kv_element> {
  using kv_element = typename Config::kv_element;
  using Tile = SharedTile<Config>;
  using Descales = TileDescales<kv_element>;
  using Descales::k_descale, Descales::v_descale;

  static constexpr bool paged = Config::page_rows > 0;

  const kv_element *k, *v;  // where the keys and values of the sequence begin, or (paged) of page 0

  // Sets the tile.
  void take(const Params& params, const Seqlen& its_seqlen, int sequence, int key_head, int m_block) {
    Tile& tile = *this;
    tile = {its_seqlen,
            sequence,
            key_head,
            m_block,
            params.qheads_per_khead,
            item_blocks<Config>(params, its_seqlen, m_block)};
    const CacheParams& cache = cache_of(params);
    const int own = paged ? 0 : clamp(cache_place<Config>(cache, sequence, 0).cache, 0, cache.num_caches - 1);
    k = head_of_cache(params.k, params.k_strides, own);
    v = head_of_cache(params.v, params.v_strides, own);
    Descales::take(cache, sequence, key_head);
  }

  auto keys(const Params& params) const { return cached(params, k, params.k_strides, cache_of(params).k_slot_bytes); }
  auto values(const Params& params) const { return cached(params, v, params.v_strides, cache_of(params).v_slot_bytes); }

  const kv_element* key_row(const Params& params, int key) const { return keys(params).at(key); }
  const kv_element* value_row(const Params& params, int key) const { return values(params).at(key); }

 private:
  const kv_element* head_of_cache(const void* pointer, const Strides& strides, int own) const {
    const int first_row = paged ? 0 : this->seqlen.k_first_row;
    return static_cast<const kv_element*>(pointer) + own * strides.batch + this->key_head * strides.head +
           first_row * strides.seqlen;
  }

  auto cached(const Params& params, const kv_element* pointer, const Strides& strides, int slot_bytes) const {
    const int length = this->seqlen.k;
    if constexpr (paged) {
      const CacheParams& cache = cache_of(params);
      const i32* const table = cache.block_table + this->sequence * cache.block_table_batch_stride;
      return PagedRows<kv_element, Config::page_rows, Config::slots>{
          pointer, strides, slot_bytes, length, cache, table, this->seqlen.k_first_row};
    } else {
      return PointedRows<kv_element>{pointer, strides, length};
    }
  }
};

// What a thread block works on, in shared memory, since the accumulators leave no registers to carry it in.
template <class Config>
struct CacheWork {
  CacheTile<Config> tile;
  int begin, end;                 // blocks of keys, from the tile's first on
  int first_position, positions;  // of the item, among those of all items
  int next_position;              // the one behind the unit's
  int before;                     // how many positions are before those of the sequence
};

// The shared memory of a thread block behind the tiles: the work, and what the plan would say where there is none.
template <class Config>
struct CacheMemory {
  CacheWork<Config> work;
  EvenCut cut;  // of all positions; void if the thread block has none
  int batch;    // the sequence that has the first of its positions
  PlannedSequence sequences[Config::own_sequences + 1];
};

// A unit of a thread block, whose item is what the work in shared memory says.
template <class Config>
struct CacheUnit {
  const CacheWork<Config>* item;  // null: there is no unit
  int begin, end;

  bool exists() const { return item != nullptr; }

  template <class Tile, class Argument>
  const Tile& work(const Argument&) const {
    return item->tile;
  }
};

// The units of a thread block, as a plan says or, where CacheParams::divides, as `divide` finds. All threads call it,
// `first` and `next`.
template <class Config>
struct CacheSchedule {
  using Unit = CacheUnit<Config>;

  const Params& params;
  const CacheParams& cache;
  CacheMemory<Config>& own;  // in shared memory

  // Whether thread blocks divide the work themselves.
  bool divides() const { return Config::own_sequences > 0 && cache.divides; }

  bool one_item() const { return cache.num_splits > 0; }

  // Reads the lengths of all sequences, and nothing that the grid before writes. What it finds the first warp may read,
  // and the others behind a barrier. Code comes from memory where a launch is alone, so that it is short: all threads
  // read lengths, and one warp does the rest.
  void divide() const {
    const int thread = ptx::tid_x(), batch = params.batch;
#pragma unroll 1
    for (int b = thread; b < batch; b += Config::num_threads) {
      const Seqlen seqlen = cached_seqlen<Config>(params, cache, b, 0, 0);
      const int positions = sequence_positions<Config>(params, cache, seqlen);
      own.sequences[b] = {positions, 0, seqlen.k_first_row, seqlen.k};
    }
    __syncthreads();
    if (thread >= 32) return;
    int positions = 0;
#pragma unroll 1
    for (int b = thread; b - thread < batch; b += 32) {
      const int its = b < batch ? own.sequences[b].before : 0;
      const int with_its = scanned<false>(its);
      if (b < batch) own.sequences[b].before = positions + with_its - its;
      positions += __shfl_sync(0xffffffffu, with_its, 31);
    }
    const int used = used_blocks(cache, positions);
    const int quotient = u32(positions) / u32(used);
    const EvenCut cut{quotient, positions - quotient * used};
    const int position = cut.begin(blockIdx.x);
    if (thread == 0) {
      own.cut = position < positions ? cut : EvenCut{0, 0};
      own.batch = 0;
      own.sequences[batch] = {positions, 0, 0, 0};
    }
    __syncwarp();
#pragma unroll 1
    for (int b = thread; b < batch; b += 32) {
      if (own.sequences[b].before <= position && position < own.sequences[b + 1].before) own.batch = b;
    }
    __syncwarp();
  }

  Unit first(int block) const {
    if (ptx::tid_x() == 0) {
      PlannedBlock start;
      if (divides())
        start = {own.cut, own.batch, params.seqlen_q, own.sequences[own.batch]};
      else
        start = memory().blocks[block];
      const int position = start.cut.begin(block), end = start.cut.begin(block + 1);
      own.work.positions = 0;
      if (position < end) {
        const PlannedSequence& its = start.sequence;
        take(start.batch, its.before, {start.q_rows, its.keys, its.q_first_row, its.k_first_row}, position, end);
      }
    }
    __syncthreads();
    return own.work.positions > 0 ? unit() : none();
  }

  Unit next(const Unit&, int block) const {
    const CacheWork<Config>& work = own.work;
    const int position = work.next_position, end = cut().begin(block + 1);
    if (position >= end) return none();
    __syncthreads();  // every thread has read what the unit before was
    if (ptx::tid_x() == 0) {
      const PlannedSequence* sequence = sequences() + work.tile.sequence;
      if (position < sequence[1].before) {
        take(work.tile.sequence, work.before, work.tile.seqlen, position, end);
      } else {
        int batch = work.tile.sequence;
        do {
          ++sequence;
          ++batch;
        } while (sequence[1].before == position);  // sequences without rows of q have no positions
        take(batch, position, seqlen_of(sequence[0], sequence[1]), position, end);
      }
    }
    __syncthreads();
    return unit();
  }

  Sharers sharers(const CacheWork<Config>*) const {
    const CacheWork<Config>& work = own.work;
    const int first_position = work.first_position;
    if (cache.num_splits > 0) return {first_position, cache.num_splits};
    const EvenCut its_cut = cut();
    const int first = its_cut.part_of(first_position);
    return {first, its_cut.part_of(first_position + work.positions - 1) - first + 1};
  }

 private:
  EvenCut cut() const { return divides() ? own.cut : memory().blocks[blockIdx.x].cut; }

  PlanMemory memory() const { return PlanMemory(params, cache); }
  const PlannedSequence* sequences() const { return divides() ? own.sequences : memory().sequences; }

  Seqlen seqlen_of(const PlannedSequence& sequence, const PlannedSequence& following) const {
    const int q_rows = rows_between<Config>(params, sequence, following);
    return {q_rows, sequence.keys, sequence.q_first_row, sequence.k_first_row};
  }

  Unit unit() const { return {&own.work, own.work.begin, own.work.end}; }
  static Unit none() { return {nullptr, 0, 0}; }

  // Sets the work to the unit of a position of a sequence, whose positions begin behind `before` others; those of the
  // thread block end with `last`.
  void take(int batch, int before, const Seqlen& seqlen, int position, int last) const {
    CacheWork<Config>& work = own.work;
    const SequenceItem its = sequence_item<Config>(params, cache, seqlen, position - before);
    work.tile.take(params, seqlen, batch, its.head, its.m_block);
    work.before = before;
    work.first_position = before + its.first;
    work.positions = its.positions;
    work.begin = position - work.first_position;
    work.end = min_of(its.positions, last - work.first_position);
    work.next_position = work.first_position + work.end;
    if (cache.num_splits > 0) {
      const int count = max_of(0, work.tile.blocks.end - work.tile.blocks.begin), part = work.begin;
      const EvenCut cut{count / cache.num_splits, count % cache.num_splits};
      work.begin = cut.begin(part);
      work.end = cut.begin(part + 1);
    }
  }
};

}  // namespace attention
