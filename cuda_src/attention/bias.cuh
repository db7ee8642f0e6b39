// attention: the score term that adds an array.
#pragma once

#include "attention/exact_sums.cuh"
#include "attention/score_array.cuh"
#include "attention/score_tile.cuh"
#include "attention/term.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared.cuh"
#include "ptx/thread.cuh"
#include "tile/accumulator.cuh"

namespace attention {

struct BiasData {
  const void* bias;
  float* dbias;  // of the same shape, contiguous
  ScoreArrayLayout layout;
  i64 dbatch_stride, dhead_stride;  // of dbias, in bytes
  i64 zeros;                        // how many of its numbers have to be 0 first: all, or none if all are stored
  i32 dquery_stride;
};

// What it is given where sums of its gradient are to be exact.
struct OrderedBiasData {
  BiasData own;
  u64* dbias_words;
};

inline const BiasData& own(const BiasData& data) { return data; }
inline const BiasData& own(const OrderedBiasData& data) { return data.own; }
inline AtomicSums sums_of(const BiasData& data) { return {data.dbias, data.zeros}; }
inline ExactSums sums_of(const OrderedBiasData& data) { return {data.own.dbias, data.dbias_words, data.own.zeros}; }

// A score s becomes s + bias[batch][head][query][key]. `alone` is whether an element of the bias belongs to one score
// only, whose gradient is then stored; over_queries and over_keys are whether all of a kind share an element.
// With `ordered` sums of gradients are exact; with `apart_` this has none, since a kernel of its own makes it.
template <class element, int step, bool paired, bool wide, bool bounded, bool per_head_, bool alone, bool over_queries,
          bool over_keys, bool ordered = false, bool apart_ = false>
struct Bias : Term {
  using Data = typename Choice<ordered, OrderedBiasData, BiasData>::Type;
  using Sums = typename Choice<ordered, ExactSums, AtomicSums>::Type;
  using Array = ScoreArray<sizeof(element), step, paired, wide, bounded>;
  using Loaded = typename Array::Bits;
  template <class Place, int m_tiles, int cols>
  using Ahead = ScoreTile<Bias, Place, m_tiles, cols>;
  static constexpr bool per_head = per_head_, bends = false, has_gradient = !apart_, loads = true;
  static constexpr bool sequences_share = per_head && !(alone || over_queries || over_keys);
  static constexpr bool finishes = ordered, apart = apart_, light = apart;
  static constexpr bool gathers = over_queries || over_keys;
  static_assert(!apart || !(gathers || ordered || bounded), "a tile of such a gradient is not a tile of scores");

  Array array;
  char* dbias;
  i32 dquery_stride;
  Sums sums;

  Bias(const Data& data, int batch, int head)
      : array(own(data).bias, own(data).layout, batch, head),
        dbias(reinterpret_cast<char*>(own(data).dbias) + batch * own(data).dbatch_stride +
              head * own(data).dhead_stride),
        dquery_stride(own(data).dquery_stride),
        sums(sums_of(data)) {}

  static float number(u32 bits) {
    if constexpr (is_same<element, f32>)
      return __uint_as_float(bits);
    else
      return ptx::cvt_f32(element{u16(bits)});
  }

  template <bool along_keys>
  Loaded load(const Point& low, const Point& high) const {
    return array.template bits<along_keys>(low, high);
  }

  float score(float s, const Point& at) const { return s + number(array.bits(at)); }
  float score(float s, const Point&, const Loaded& loaded, int e) const { return s + number(loaded.of(e)); }

  static constexpr bool stages = wide && !bounded && !over_queries;

  // Rows lie so far apart that the lanes that read eight of them, or four of float32, meet in no bank.
  template <int rows, int cols>
  struct Staged {
    static constexpr int unit = 8 * sizeof(element), row_bytes = (cols * int(sizeof(element)) / unit | 1) * unit;
    static_assert(cols * sizeof(element) % unit == 0, "a row is whole units");
    static constexpr int bytes = rows * row_bytes;

    u32 from;

    Staged(u32 from, int row, int col) : from(from + row * row_bytes + col * sizeof(element)) {}

    Loaded of(int i, int j) const {
      const u32 address = from + 8 * i * row_bytes + 8 * j * sizeof(element);
      if constexpr (sizeof(element) == 4) {
        const uint2 words = ptx::ld_shared_v2(address);
        return {words.x, words.y};
      } else {
        return {ptx::ld_shared_u32(address)};
      }
    }
  };

  // In chunks of 16 bytes, by so many lanes of each row. Rows past the end are the last one again, so that nothing odd
  // is made of them.
  template <int rows, int cols>
  void put(u32 to, const TilePoint& at) const {
    constexpr int chunks = ceil_div(cols * int(sizeof(element)), 16), lanes = chunks > 16 ? 32 : chunks > 8 ? 16 : 8;
    static_assert(chunks <= 32, "a lane has one chunk of a row");
    const int lane = tile::lane(), chunk = lane % lanes, key = chunk * 16 / int(sizeof(element));
    if (chunk >= chunks) return;
    const char* const from = array.address(at.query, at.key + key);
    const int bytes = key < at.keys ? 16 : 0;
    to += chunk * 16;
#pragma unroll 4
    for (int row = lane / lanes; row < rows; row += 32 / lanes) {
      const char* const its = from + i64(min_of(row, at.queries - 1)) * array.query_stride;
      ptx::cp_async<16>(to + row * Staged<rows, cols>::row_bytes, its, bytes);
    }
  }

  float* daddress(const Point& at) const {
    const i32 query_stride = over_queries ? 0 : dquery_stride, key_stride = over_keys ? 0 : sizeof(float);
    return reinterpret_cast<float*>(dbias + offset_of(at, query_stride, key_stride));
  }

  void gradient(float ds, const Point& at) const {
    if (gathers || (bounded && !array.holds(at))) return;
    if constexpr (alone)
      *daddress(at) = ds;
    else
      sums.add(daddress(at), ds);
  }

  // Sums over the rows or columns that share elements, first of each thread and then of the warp.
  template <class Entries, class Place>
  void gather(const Entries& ds, const Place& place) const {
    constexpr bool along_keys = Place::Row::along_keys;
    constexpr bool over_columns = along_keys ? over_keys : over_queries,
                   over_rows = along_keys ? over_queries : over_keys;
    float total = 0.0f, columns[Entries::n_tiles][2] = {};
#pragma unroll
    for (int t = 0; t < Entries::m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto row = place.row(t, i);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < Entries::n_tiles; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float x = !bounded || array.holds(row.at(8 * j + e)) ? ds.x[t][j][2 * i + e] : 0.0f;
            over_columns ? sum += x : columns[j][e] += x;
          }
        }
        total += sum;
        if constexpr (over_columns && !over_rows) add(sum, 1, 2, row.at(0));
      }
    }
    const auto row = place.row(0, 0);
    if constexpr (over_columns && over_rows) add(total, 1, 16, row.at(0));
    if constexpr (!over_columns && over_rows) {
#pragma unroll
      for (int j = 0; j < Entries::n_tiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) add(columns[j][e], 4, 16, row.at(8 * j + e));
      }
    }
  }

  // Adds the sum of x over lanes that differ in bits `first` to `last` of their numbers. What is 0 need not be added,
  // and where nothing is seen there may be no element.
  void add(float x, int first, int last, const Point& at) const {
#pragma unroll
    for (int bit = first; bit <= last; bit *= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
    if (x != 0.0f && (tile::lane() & (2 * last - first)) == 0) sums.add(daddress(at), x);
  }

  static void begin(const Data& data, i64 thread, i64 threads) { sums_of(data).begin(thread, threads); }
  static void finish(const Data& data, i64 thread, i64 threads) { sums_of(data).finish(thread, threads); }
};

}  // namespace attention
