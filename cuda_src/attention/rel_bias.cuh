// attention: the score term that adds a number for each head and distance.
#pragma once

#include "attention/exact_sums.cuh"
#include "attention/term.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/shared.cuh"
#include "tile/accumulator.cuh"
#include "tile/diagonals.cuh"

namespace attention {

struct RelBiasData {
  const float* rel_bias;  // (heads, 2 · reach + 1)
  float* drel_bias;       // of the same shape, contiguous
  i64 head_stride;
  i32 distance_stride, reach;
  i64 size;
};

// What it is given where sums of its gradient are to be exact.
struct OrderedRelBiasData {
  RelBiasData own;
  u64* drel_bias_words;
};

inline const RelBiasData& own(const RelBiasData& data) { return data; }
inline const RelBiasData& own(const OrderedRelBiasData& data) { return data.own; }
inline AtomicSums sums_of(const RelBiasData& data) { return {data.drel_bias, data.size}; }
inline ExactSums sums_of(const OrderedRelBiasData& data) {
  return {data.own.drel_bias, data.drel_bias_words, data.own.size};
}

// A score s becomes s + rel_bias[head][reach + clip(i + diagonal - j, -reach, reach)]. With `ordered` sums of gradients
// are exact.
template <bool ordered>
struct RelBias : Term {
  using Data = typename Choice<ordered, OrderedRelBiasData, RelBiasData>::Type;
  using Sums = typename Choice<ordered, ExactSums, AtomicSums>::Type;
  static constexpr bool bends = false, has_gradient = true, gathers = true, finishes = ordered;
  static constexpr bool loads = true, stages = true, light = true;

  struct Loaded {
    float x[2];
  };

  const float* row;  // of distance 0
  float* drow;
  i32 stride, reach;
  Sums sums;

  RelBias(const Data& data, int, int head)
      : row(own(data).rel_bias + head * own(data).head_stride + i64(own(data).reach) * own(data).distance_stride),
        drow(own(data).drel_bias + i64(head) * (2 * own(data).reach + 1) + own(data).reach),
        stride(own(data).distance_stride),
        reach(own(data).reach),
        sums(sums_of(data)) {}

  float number(int steps) const { return row[i64(clamp(steps, -reach, reach)) * stride]; }

  float score(float s, const Point& at) const { return s + number(at.steps()); }
  float score(float s, const Point&, const Loaded& loaded, int e) const { return s + loaded.x[e]; }

  template <bool along_keys>
  Loaded load(const Point& low, const Point& high) const {
    return {number(low.steps()), number(high.steps())};
  }

  // A thread's two rows of an m-tile are 8 apart, as its pairs of columns are, so that they have most numbers in
  // common.
  template <class Place, int m_tiles, int cols>
  struct Ahead {
    static constexpr int above = 2 * m_tiles - 1, diagonals = cols / 8 + above;
    float x[diagonals][2];

    void load(const RelBias& term, const Place& place) {
      constexpr int sign = Place::Row::along_keys ? -1 : 1;
      const int steps = place.row(0, 0).at(0).steps();
#pragma unroll
      for (int d = 0; d < diagonals; ++d) {
#pragma unroll
        for (int e = 0; e < 2; ++e) x[d][e] = term.number(steps + sign * (8 * (d - above) + e));
      }
    }

    void arrange() {}

    Loaded of(int t, int i, int j) const {
      const float (&both)[2] = x[j - 2 * t - i + above];
      return {both[0], both[1]};
    }
  };

  // Of a tile's numbers, from that of its last query and first key on, there are two copies, so that the pairs of even
  // and of odd rows are aligned.
  template <int rows, int cols>
  struct Staged {
    static constexpr int numbers = rows + cols, bytes = 2 * numbers * sizeof(float), copied = 0;

    u32 from;

    Staged(u32 from, int warp_row) : from(from) {
      const int row = warp_row + tile::fragment_row(0, 0), col = tile::fragment_col();
      this->from += (row % 2 == 0 ? numbers : 0) * sizeof(float) + (rows - 1 - row + col + (row % 2 == 0)) * 4;
    }

    Loaded of(int i, int j) const {
      const float2 both = ptx::ld_shared_f32x2(from + 8 * (j - i) * sizeof(float));
      return {both.x, both.y};
    }
  };

  template <int rows, int cols, class Map>
  void put(u32 to, const TilePoint& at, const Map&, u32) const {
    constexpr int numbers = Staged<rows, cols>::numbers;
    const int first = at.query + rows - 1 + at.diagonal - at.key;  // the distance of the first number
    constexpr int each = ceil_div(numbers - 1, 32);
    float x[each];
#pragma unroll
    for (int i = 0; i < each; ++i) x[i] = number(first - (int(tile::lane()) + 32 * i));
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const int k = int(tile::lane()) + 32 * i;
      if (k >= numbers - 1) continue;
      ptx::st_shared_u32(to + k * sizeof(float), __float_as_uint(x[i]));
      ptx::st_shared_u32(to + (numbers + k + 1) * sizeof(float), __float_as_uint(x[i]));
    }
  }

  // Entries of a diagonal have the same distance. Their sums are made first in each thread, whose entries lie in steps
  // of 8, and then over the warp.
  template <class Entries, class Place>
  void gather(const Entries& ds, const Place& place) const {
    constexpr bool along_keys = Place::Row::along_keys;
    constexpr int above = 2 * Entries::m_tiles - 1, diagonals = Entries::n_tiles + above, sign = along_keys ? -1 : 1;
    constexpr u32 all = 0xffffffffu;
    float shares[diagonals][2] = {};
#pragma unroll
    for (int t = 0; t < Entries::m_tiles; ++t) {
#pragma unroll
      for (int j = 0; j < Entries::n_tiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) shares[j - 2 * t - i / 2 + above][i % 2] += ds.x[t][j][i];
      }
    }
    const int row = tile::lane() / 4, col = 2 * (tile::lane() % 4);
    const int steps = place.row(0, 0).at(0).steps();
    const int first = steps - sign * (col - row);  // of the warp's first row and column
    constexpr int behind = Entries::n_tiles * 8 - 1, before = Entries::m_tiles * 16 - 1;
    const int nearest = first - (along_keys ? behind : before), farthest = first + (along_keys ? before : behind);
    if (nearest >= reach || farthest <= -reach) {  // all entries have the same number
      float sum = 0.0f;
#pragma unroll
      for (int d = 0; d < diagonals; ++d) sum += shares[d][0] + shares[d][1];
#pragma unroll
      for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(all, sum, step);
      if (tile::lane() == 0 && sum != 0.0f) sums.add(drow + (nearest >= reach ? reach : -reach), sum);
      return;
    }
    const warp::Diagonals<diagonals> found(shares);
#pragma unroll
    for (int s = 0; s < found.slots; ++s) {
      // What is 0 need not be added, and where no query sees a key there may be no such distance.
      const int distance = clamp(first + sign * (found.diagonal(s) - 8 * above), -reach, reach);
      if (found.sums[s] != 0.0f) sums.add(drow + distance, found.sums[s]);
    }
  }

  static void begin(const Data& data, i64 thread, i64 threads) { sums_of(data).begin(thread, threads); }
  static void finish(const Data& data, i64 thread, i64 threads) { sums_of(data).finish(thread, threads); }
};

}  // namespace attention
