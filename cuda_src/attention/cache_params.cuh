// attention: what kernels over caches of keys and values are told beside Params: where the caches are, what is appended
// to them, and how the work is divided. The host packs the same layout.
#pragma once

#include "attention/params.cuh"
#include "core/math.cuh"
#include "core/types.cuh"

namespace attention {

// A cache is one of `k_cache` and `v_cache` for each sequence or, paged, pages that a table names. In Params `k` and
// `v` are the caches: `batch` strides over caches or pages and `seqlen` over rows, seqlen_k is how many rows a sequence
// has room for, and `q` is what the main kernel reads, rotated if it is to be. Row r of page p has, for Config::slots,
// the slot p · page_slots + r · row_slots: how k and v lie differs then by how far apart their slots are, and 32 bits
// hold all of these numbers.
struct CacheParams {
  const void* given_q;  // what is rotated into `q` of Params
  const void* new_k;
  const void* new_v;
  const i32* cache_seqlens;    // (batch,), without what is appended; null: the caches are full
  const i32* block_table;      // (batch, max_pages): where the pages of a sequence are
  const i32* cache_batch_idx;  // (batch,); null: sequence b has cache b
  const i32* cache_leftpad;    // (batch,): how many of the first rows are not keys; null: none
  const void* rotary_cos;      // (max_position, rotary_dim / 2); null: nothing is rotated
  const void* rotary_sin;
  i32* plan;        // see attention/cache_plan.cuh
  float* partials;  // see attention/split_merge.cuh
  Strides given_q_strides, new_k_strides, new_v_strides;
  Strides rotary_cos_strides, rotary_sin_strides;  // of seqlen and dim
  i64 block_table_batch_stride, block_table_page_stride;
  i64 cache_seqlens_stride, cache_batch_idx_stride, cache_leftpad_stride;
  i32 num_heads_k, heads_reciprocal;  // of SmallDivisor, for kernels with few tiles
  i32 num_caches;                     // caches or pages that there are
  i32 page_size;                      // rows of a page
  i32 page_shift;                     // of Divisor, as is page_reciprocal
  u32 page_reciprocal;
  i32 page_slots, row_slots;       // how many slots pages, and rows of a page, are apart
  i32 k_slot_bytes, v_slot_bytes;  // how many bytes slots are apart
  i32 appends;                     // whether new_k and new_v are appended
  i32 seqlen_new;                  // so many rows to each sequence, or (varlen) to all together
  i32 max_position;
  i32 rotary_dim;
  i32 rotary_interleaved;  // whether columns 2 i and 2 i + 1 are a pair, rather than i and i + rotary_dim / 2
  i32 rotary_moves;     // whether row i of q is rotated as at position i behind the cache, rather than all as the first
  i32 rotary_floats;    // whether the table is float32, whatever the caches are
  i32 wide_rows;        // whether rows of what is copied begin at multiples of 16 bytes
  i32 makes_plan;       // whether the first launch's first thread block makes the plan; the others append
  i32 divides;          // whether of the plan that is the counters alone, and thread blocks divide the work themselves
  i32 plan_blocks;      // thread blocks that the plan has room for
  i32 least_blocks;     // of which it uses so many at least,
  i32 least_positions;  // and more only where each has so many positions
  i32 num_splits;       // parts of every item's keys; 0: as the division falls
  // What keys and values in e4m3 are to be multiplied by, of a sequence and a key head; null: 1.
  const float* k_descale;
  const float* v_descale;
  i64 k_descale_batch_stride, k_descale_head_stride, v_descale_batch_stride, v_descale_head_stride;
};

// What the kernels over caches are given.
struct CacheArgument {
  Params params;
  CacheParams cache;
};

// The rest of what a kernel over caches is given, by its Params.
inline const CacheParams& cache_of(const Params& params) {
  return reinterpret_cast<const CacheArgument&>(params).cache;
}

// What the keys of a sequence are to be multiplied by in a head, and its values.
inline float k_descale(const CacheParams& cache, int batch, int head) {
  if (!cache.k_descale) return 1.0f;
  return cache.k_descale[batch * cache.k_descale_batch_stride + head * cache.k_descale_head_stride];
}
inline float v_descale(const CacheParams& cache, int batch, int head) {
  if (!cache.v_descale) return 1.0f;
  return cache.v_descale[batch * cache.v_descale_batch_stride + head * cache.v_descale_head_stride];
}

// The place of a row in the caches.
struct CachePlace {
  int cache;  // which cache or page
  int row;    // of it
};

// The page of a row of a sequence, counted from the sequence's first, and its row of the page.
constexpr CachePlace paged(const CacheParams& params, int position) {
  const int page = Divisor{params.page_size, params.page_shift, params.page_reciprocal}.quotient(position);
  return {page, position - page * params.page_size};
}

// Where a sequence has a row, as its table or cache_batch_idx says, which may be anything.
template <class Config>
inline CachePlace cache_place(const CacheParams& params, int batch, int position) {
  if constexpr (Config::page_rows > 0) {
    const CachePlace at = paged(params, position);
    return {params.block_table[batch * params.block_table_batch_stride + at.cache * params.block_table_page_stride],
            at.row};
  }
  return {params.cache_batch_idx ? params.cache_batch_idx[batch * params.cache_batch_idx_stride] : batch, position};
}

// How many rows of a sequence's cache are taken before anything is appended.
constexpr int cached_rows(const Params& params, const CacheParams& cache, int batch) {
  if (!cache.cache_seqlens) return params.seqlen_k;
  return clamp(cache.cache_seqlens[batch * cache.cache_seqlens_stride], 0, params.seqlen_k);
}

}  // namespace attention
