// attention: an array with a number for each score, (batch, num_heads, queries, keys), as score terms read it.
#pragma once

#include "attention/term.cuh"
#include "core/math.cuh"
#include "core/types.cuh"

namespace attention {

// Where its elements lie, by strides in bytes. An axis with one element for all has the stride 0, and no end.
struct ScoreArrayLayout {
  i64 batch_stride, head_stride;
  i32 query_stride, key_stride;
  i32 queries, keys;  // how many there are
};

// Where an element lies behind the first of its sequence and head, in bytes, by the strides of queries and keys.
inline i64 offset_of(const Point& at, i32 query_stride, i32 key_stride) {
  const int first_query = at.query - at.query_step, first_key = at.key - at.key_step;
  const i64 first = i64(first_query) * query_stride + i64(first_key) * key_stride;
  return first + i64(at.query_step) * query_stride + i64(at.key_step) * key_stride;
}

// Bits of two elements that are side by side in scores.
template <int bytes>
struct ScoreBits {
  u32 both;

  u32 of(int e) const { return both >> (8 * bytes * e) & ((1u << 8 * bytes) - 1); }
  static ScoreBits make(u32 low, u32 high) { return {low | high << 8 * bytes}; }
};

template <>
struct ScoreBits<4> {
  u32 low, high;

  u32 of(int e) const { return e == 0 ? low : high; }
  static ScoreBits make(u32 low, u32 high) { return {low, high}; }
};

template <int bytes>
struct ScoreWord;
template <>
struct ScoreWord<1> {
  using One = u8;
  using Two = u16;
};
template <>
struct ScoreWord<2> {
  using One = u16;
  using Two = u32;
};
template <>
struct ScoreWord<4> {
  using One = u32;
  using Two = uint2;
};

// x ← words at an aligned address, or zeros if they are not there.
template <int n>
inline void load_words(u32 (&x)[n], const char* from, bool there) {
  static_assert(n == 1 || n == 2 || n == 4, "of one load");
  if constexpr (n == 4) {
    const uint4 words = there ? *reinterpret_cast<const uint4*>(from) : uint4{};
    x[0] = words.x, x[1] = words.y, x[2] = words.z, x[3] = words.w;
  } else if constexpr (n == 2) {
    const uint2 words = there ? *reinterpret_cast<const uint2*>(from) : uint2{};
    x[0] = words.x, x[1] = words.y;
  } else {
    x[0] = there ? *reinterpret_cast<const u32*>(from) : 0;
  }
}

// The array for a sequence and a query head, whose elements are of so many bytes. `step` is the stride of keys, in
// elements, if that is 0 or 1, else -1; `paired` is whether two keys, the first an even one, can be read at once,
// `wide` whether 16 aligned bytes of keys can; `bounded` whether there may be queries and keys beyond its ends, where
// its bits count as 0.
template <int bytes_, int step, bool paired_, bool wide_, bool bounded>
struct ScoreArray {
  static constexpr int bytes = bytes_;
  static constexpr bool paired = paired_, wide = wide_;
  using One = typename ScoreWord<bytes>::One;
  using Two = typename ScoreWord<bytes>::Two;
  using Bits = ScoreBits<bytes>;
  static_assert(!paired || step == 1, "neighbours lie side by side");
  static_assert(!wide || paired, "what is aligned to 16 bytes is so to less");

  const char* origin;
  i32 query_stride, key_stride;
  i32 queries, keys;

  ScoreArray(const void* array, const ScoreArrayLayout& at, int batch, int head)
      : origin(static_cast<const char*>(array) + batch * at.batch_stride + head * at.head_stride),
        query_stride(at.query_stride),
        key_stride(at.key_stride),
        queries(at.queries),
        keys(at.keys) {}

  bool holds(const Point& at) const { return at.live && (!bounded || (at.query < queries && at.key < keys)); }

  const char* address(const Point& at) const {
    return origin + offset_of(at, query_stride, step == 0 ? 0 : step == 1 ? bytes : key_stride);
  }

  // The same of a paired array, where neither need be there.
  const char* address(int query, int key) const { return origin + i64(query) * query_stride + i64(key) * bytes; }

  // How many keys, of `live` that the sequence has, it holds from one on, and how many queries; for a query, none if it
  // does not hold that.
  int keys_from(int key, int live) const { return (bounded ? min_of(live, keys) : live) - key; }
  int keys_from(int query, int key, int live) const { return bounded && query >= queries ? 0 : keys_from(key, live); }
  int queries_from(int query, int live) const { return (bounded ? min_of(live, queries) : live) - query; }

  u32 bits(const Point& at) const { return holds(at) ? *reinterpret_cast<const One*>(address(at)) : 0; }

  template <bool along_keys>
  Bits bits(const Point& low, const Point& high) const {
    if constexpr (paired && along_keys) {
      const Two word = holds(low) ? *reinterpret_cast<const Two*>(address(low)) : Two{};
      if constexpr (bytes == 4)
        return {word.x, word.y};
      else
        return {word};
    } else {
      return Bits::make(bits(low), bits(high));
    }
  }
};

}  // namespace attention
