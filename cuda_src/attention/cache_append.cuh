// attention: writes new keys and values behind those that caches hold, and rotates them, and queries, by their
// positions (Su et al., "RoFormer", 2021). There is a thread block per token.
#pragma once

#include "attention/cache_params.cuh"
#include "attention/params.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "tile/accumulator.cuh"
#include "tile/copy.cuh"

namespace attention {

// Returns, on every thread, what `combine` makes of the x of all threads of the block. All of them call this.
template <int threads, class Combine>
inline int block_reduced(int x, Combine&& combine) {
  __shared__ int of_warps[threads / 32];
#pragma unroll
  for (int step = 1; step < 32; step *= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, step));
  __syncthreads();  // every thread has read what the call before has left
  if (tile::lane() == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < threads / 32; ++warp) x = combine(x, of_warps[warp]);
  return x;
}

// A row of new keys and values and of q, by its place in the sequence and in the arrays.
struct Token {
  int batch;  // negative: it is no sequence's
  int place, row;
};

// The token of a thread block, all of whose threads call this.
template <class Config>
inline Token find_token(const Params& params, const CacheParams& cache, int index) {
  if constexpr (!Config::varlen) {
    const int rows = max_of(cache.seqlen_new, cache.rotary_cos ? params.seqlen_q : 0);
    return {index / rows, index % rows, index % rows};
  }
  // As in attention/packed.cuh: the sequence ends with the first offset beyond the row, and begins with the largest
  // before that.
  const auto offset = [&](int b) {
    return clamp(params.cu_seqlens_q[b * params.cu_seqlens_q_stride], 0, params.seqlen_q);
  };
  int end = params.batch + 1, begin = 0;
  for (int b = threadIdx.x; b <= params.batch; b += Config::prepare_threads) {
    if (offset(b) > index) end = min_of(end, b);
  }
  end = block_reduced<Config::prepare_threads>(end, min_of);
  for (int b = threadIdx.x; b < end; b += Config::prepare_threads) begin = max_of(begin, offset(b));
  begin = block_reduced<Config::prepare_threads>(begin, max_of);
  return {end > params.batch ? -1 : end - 1, index - begin, index};
}

// The row of a token in each of the heads of an array.
template <class element>
struct HeadRows {
  element* pointer;
  i64 head_stride, col_stride;

  HeadRows(const void* array, const Strides& strides, i64 outer, i64 row)
      : pointer(static_cast<element*>(const_cast<void*>(array)) + outer * strides.batch + row * strides.seqlen),
        head_stride(strides.head),
        col_stride(strides.dim) {}
};

// The cosines and sines of a position.
template <class element>
struct Rotation {
  const CacheParams& cache;
  i64 position;

  Rotation(const CacheParams& cache, int position) : cache(cache), position(min_of(position, cache.max_position - 1)) {}

  float number(const void* table, const Strides& strides, int pair) const {
    const i64 at = position * strides.seqlen + pair * strides.dim;
    if (cache.rotary_floats) return static_cast<const float*>(table)[at];
    return ptx::cvt_f32(static_cast<const element*>(table)[at]);
  }

  // The column that a column is a pair with.
  int partner(int col) const {
    const int half = cache.rotary_dim / 2;
    return cache.rotary_interleaved ? col ^ 1 : col < half ? col + half : col - half;
  }

  // What becomes of column `col`, which holds x, where its partner holds y.
  float rotated(int col, element x, element y) const {
    const int first = min_of(col, partner(col)), pair = cache.rotary_interleaved ? first / 2 : first;
    const float cos = number(cache.rotary_cos, cache.rotary_cos_strides, pair);
    const float sin = number(cache.rotary_sin, cache.rotary_sin_strides, pair);
    const float turned = ptx::cvt_f32(y) * (col == first ? -sin : sin);
    return fmaf(ptx::cvt_f32(x), cos, turned);
  }
};

// 16 bytes of a row.
template <class element>
union HeldChunk {
  static constexpr int count = 16 / sizeof(element);
  uint4 words;
  element elements[count];
};

// Chunk `chunk` of a row, after put(chunk, i, x) for each element i that is rotated, and so becomes x.
template <int aligned_bytes, int cols, class element, class Put>
inline uint4 rotate_chunk(const element* row, i64 col_stride, int chunk, const Rotation<element>& rotation, Put&& put) {
  constexpr int chunk_elements = HeldChunk<element>::count;
  HeldChunk<element> own, partners;
  own.words = tile::load_chunk<aligned_bytes, cols>(row, col_stride, chunk);
  const int first = chunk * chunk_elements, dim = rotation.cache.rotary_dim;
  if (first >= dim) return own.words;
  if (rotation.cache.rotary_interleaved) {
#pragma unroll
    for (int i = 0; i < chunk_elements; ++i) partners.elements[i] = own.elements[i ^ 1];
  } else if (dim / 2 % chunk_elements == 0) {
    partners.words = tile::load_chunk<aligned_bytes, cols>(row, col_stride, rotation.partner(first) / chunk_elements);
  } else {
#pragma unroll
    for (int i = 0; i < chunk_elements; ++i) {
      if (first + i < dim) partners.elements[i] = row[rotation.partner(first + i) * col_stride];
    }
  }
#pragma unroll
  for (int i = 0; i < chunk_elements; ++i) {
    if (first + i < dim) put(own, i, rotation.rotated(first + i, own.elements[i], partners.elements[i]));
  }
  return own.words;
}

// to ← from, in all heads, by all threads of a block. `wide`: whether rows begin at multiples of 16 bytes.
template <bool wide, int cols, bool rotates, int threads, class element>
inline void copy_heads(const HeadRows<element>& to, const HeadRows<const element>& from, int heads,
                       const Rotation<element>& rotation) {
  constexpr int chunks = ceil_div(cols * int(sizeof(element)), 16);
  constexpr int aligned_bytes = wide ? common_power_of_2(16, cols * int(sizeof(element))) : int(sizeof(element));
  constexpr int copy_bytes = max_of(aligned_bytes, int(sizeof(element)));
#pragma unroll 1
  for (int i = threadIdx.x; i < heads * chunks; i += threads) {
    const int head = i / chunks, chunk = i % chunks;
    const element* const row = from.pointer + head * from.head_stride;
    uint4 words;
    if constexpr (rotates) {
      const auto put = [](HeldChunk<element>& held, int e, float x) { held.elements[e] = ptx::cvt_rn<element>(x); };
      words = rotate_chunk<copy_bytes, cols>(row, from.col_stride, chunk, rotation, put);
    } else {
      words = tile::load_chunk<copy_bytes, cols>(row, from.col_stride, chunk);
    }
    tile::store_chunk<copy_bytes, cols>(to.pointer + head * to.head_stride, to.col_stride, chunk, words);
  }
}

// The same, divided by descale(head) and rounded to e4m3: once, since rotated numbers are float32 until then.
template <bool wide, int cols, bool rotates, int threads, class element, class Descale>
inline void round_heads(const HeadRows<e4m3>& to, const HeadRows<const element>& from, int heads,
                        const Rotation<element>& rotation, Descale&& descale) {
  constexpr int count = wide ? common_power_of_2(4, cols) : 1, units = cols / count;  // columns of a thread at a time
#pragma unroll 1
  for (int i = threadIdx.x; i < heads * units; i += threads) {
    const int head = i / units, first = i % units * count;
    const element* const row = from.pointer + head * from.head_stride;
    const auto number = [&](int col) { return row[wide ? i64(col) : col * from.col_stride]; };
    const float divisor = descale(head);
    union {
      e4m3 elements[4];
      u32 word;
    } rounded;
#pragma unroll
    for (int e = 0; e < count; ++e) {
      const int col = first + e;
      const element own = number(col);
      float x = ptx::cvt_f32(own);
      if (rotates && col < rotation.cache.rotary_dim) x = rotation.rotated(col, own, number(rotation.partner(col)));
      rounded.elements[e] = ptx::cvt_rn_satfinite_e4m3(x / divisor);
    }
    e4m3* const its = to.pointer + head * to.head_stride;
    if constexpr (count == 4) {
      reinterpret_cast<u32*>(its)[first / 4] = rounded.word;
    } else {
#pragma unroll
      for (int e = 0; e < count; ++e) its[(first + e) * to.col_stride] = rounded.elements[e];
    }
  }
}

template <class Config, bool wide, bool rotates>
inline void append_token(const Params& params, const CacheParams& cache, const Token& token) {
  using element = typename Config::element;
  using kv_element = typename Config::kv_element;
  constexpr int threads = Config::prepare_threads;
  const int outer = Config::varlen ? 0 : token.batch, cached = cached_rows(params, cache, token.batch);
  const int position = cached + token.place, heads_q = params.num_heads_q, heads_k = cache.num_heads_k;
  if (Config::varlen || token.place < cache.seqlen_new) {
    // Nothing is written where there is no room, and nothing in a page or cache that does not exist.
    const bool room = position < params.seqlen_k;
    const CachePlace place = room ? cache_place<Config>(cache, token.batch, position) : CachePlace{-1, 0};
    if (place.cache >= 0 && place.cache < cache.num_caches) {
      const Rotation<element> rotation(cache, position);
      const HeadRows<kv_element> k(params.k, params.k_strides, place.cache, place.row);
      const HeadRows<kv_element> v(params.v, params.v_strides, place.cache, place.row);
      const HeadRows<const element> new_k(cache.new_k, cache.new_k_strides, outer, token.row);
      const HeadRows<const element> new_v(cache.new_v, cache.new_v_strides, outer, token.row);
      if constexpr (is_same<kv_element, e4m3>) {
        round_heads<wide, Config::head_dim, rotates, threads>(
            k, new_k, heads_k, rotation, [&](int head) { return k_descale(cache, token.batch, head); });
        round_heads<wide, Config::head_dim_v, false, threads>(
            v, new_v, heads_k, rotation, [&](int head) { return v_descale(cache, token.batch, head); });
      } else {
        copy_heads<wide, Config::head_dim, rotates, threads>(k, new_k, heads_k, rotation);
        copy_heads<wide, Config::head_dim_v, false, threads>(v, new_v, heads_k, rotation);
      }
    }
  }
  if (rotates && (Config::varlen || token.place < params.seqlen_q)) {
    const HeadRows<element> q(params.q, params.q_strides, outer, token.row);
    const HeadRows<const element> given_q(cache.given_q, cache.given_q_strides, outer, token.row);
    const Rotation<element> rotation(cache, cache.rotary_moves ? position : cached);
    copy_heads<wide, Config::head_dim, true, threads>(q, given_q, heads_q, rotation);
  }
}

// Appends token `index`. All threads of a block call this.
template <class Config>
inline void append(const Params& params, const CacheParams& cache, int index) {
  const Token token = find_token<Config>(params, cache, index);
  if (token.batch < 0) return;
  if (cache.rotary_cos)
    cache.wide_rows ? append_token<Config, true, true>(params, cache, token)
                    : append_token<Config, false, true>(params, cache, token);
  else
    cache.wide_rows ? append_token<Config, true, false>(params, cache, token)
                    : append_token<Config, false, false>(params, cache, token);
}

}  // namespace attention
