// attention: the score term that adds an array.
#pragma once

#include "attention/exact_sums.cuh"
#include "attention/score_array.cuh"
#include "attention/score_tile.cuh"
#include "attention/term.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "tile/accumulator.cuh"
#include "tile/shared.cuh"
#include "tile/tensor_sm90.cuh"

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
// With `ordered` sums of gradients are exact; with `apart_` this has none, since a kernel of its own makes it. `boxed_`
// is whether a tensor map describes the array.
template <class element, int step, bool paired, bool wide, bool bounded, bool per_head_, bool alone, bool over_queries,
          bool over_keys, bool ordered = false, bool apart_ = false, bool boxed_ = false>
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
  static constexpr bool stages = boxed_, boxed = boxed_;
  static_assert(!boxed || (sizeof(element) == 2 && wide && !bounded && !over_queries), "boxes are of 16 bits");
  static_assert(!apart || !(gathers || ordered || bounded), "a tile of such a gradient is not a tile of scores");

  Array array;
  int sequence, head;  // of the array
  char* dbias;
  i32 dquery_stride;
  Sums sums;

  Bias(const Data& data, int batch, int head)
      : array(own(data).bias, own(data).layout, batch, head),
        sequence(own(data).layout.batch_stride == 0 ? 0 : batch),
        head(own(data).layout.head_stride == 0 ? 0 : head),
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

  // A tile is boxes of a panel's keys. A lane reads, with one instruction, its pairs of four n-tiles of a row: those of
  // chunk c of row r are of lane 4 r + (pair of the chunk), as in the fragment of an accumulator.
  template <int rows, int cols>
  struct Staged {
    using Tile = tile::SharedTile<u16, rows, cols>;
    static constexpr int bytes = Tile::bytes, copied = bytes;
    static constexpr int together = 4;  // n-tiles
    static_assert(cols % (8 * together) == 0, "instructions are whole");

    u32 from;  // the lane's chunk of the warp's first rows
    mutable u32 x[2][cols / 8];

    Staged(u32 tile, int row) : from(Tile{tile}.address(row + int(tile::lane()) % 8, 0) ^ (tile::lane() / 8 << 4)) {}

    void read(int i, int j) const {
      // Chunk j is the lane's of panel 0, but for bits of its number that no lane has, and whole panels.
      constexpr int panel = Tile::panel_chunks;
      const u32 at = (from ^ (j % panel << 4)) + j / panel * Tile::panel_stride + Tile::step_rows(8 * i);
      ptx::ldmatrix_x4(reinterpret_cast<u32(&)[4]>(x[i][j]), at);
    }

    Loaded of(int i, int j) const {
      if (j % together == 0) read(i, j);
      return {x[i][j]};
    }
  };

  template <int rows, int cols>
  struct Turned {
    using Tile = typename Staged<rows, cols>::Tile;
    u32 x[2][rows / 8];

    // An instruction turns 8 × 8 numbers of 16 queries and 16 keys.
    void load(u32 tile, int key) {
      const int lane = tile::lane();
      const u32 from = Tile{tile}.address(lane / 16 * 8 + lane % 8, key / Tile::chunk_elements + lane / 8 % 2);
#pragma unroll
      for (int j = 0; j < rows / 8; j += 2) {
        u32 turned[4];
        ptx::ldmatrix_x4_trans(turned, from + Tile::step_rows(8 * j));
        x[0][j] = turned[0], x[1][j] = turned[1], x[0][j + 1] = turned[2], x[1][j + 1] = turned[3];
      }
    }

    Loaded of(int i, int j) const { return {x[i][j]}; }
  };

  // Queries and keys past the end become zeros.
  template <int rows, int cols, class Map>
  void put(u32 to, const TilePoint& at, const Map& map, u32 barrier) const {
    using Tile = typename Staged<rows, cols>::Tile;
    if (tile::lane() != 0) return;
#pragma unroll
    for (int panel = 0; panel < Tile::panels; ++panel) {
      ptx::cp_async_bulk_tensor_4d(to + panel * Tile::panel_stride, map, barrier,
                                   at.key + panel * tile::panel_cols<Tile>, at.query, head, sequence);
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
