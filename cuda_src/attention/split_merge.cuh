// attention: the sums of a row's parts put together: those of a thread block's warps, and those of the thread blocks
// that share an item.
//
// A part has sums that are not yet divided, and a base and a signed sum of exponentials, as Softmax has them; so steep
// rows stay what they are. A warp puts a row together, in the order of the parts, whoever they come from, so that bits
// do not depend on who was last. Blocks that share an item leave theirs in memory, and the last to arrive takes them
// all.
#pragma once

#include "attention/params.cuh"
#include "attention/repair.cuh"
#include "attention/softmax.cuh"
#include "attention/split_schedule.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"
#include "tile/accumulator.cuh"
#include "tile/copy.cuh"

namespace attention {

// A lane's columns of a row of sums: quads of columns lane, lane + lanes, and so on. So many lanes have a row.
template <int cols, int lanes = 32>
struct LaneSums {
  static constexpr int quads = cols / 4, count = ceil_div(quads, lanes);
  float x[count][4];

  static int lane() { return lanes == 32 ? tile::lane() : tile::lane() % lanes; }

  // Which of a warp's rows the lane is of.
  static int row() { return lanes == 32 ? 0 : tile::lane() / lanes; }
};

// What the parts of a row have in common: base and sum of their union.
template <class element>
struct RowUnion {
  using Statistics = Softmax<element, 1>;

  float base, sum;

  float factor(float2 part, float scale) const {
    const float higher = Statistics::higher(base, sum, part.x, part.y, scale);
    return higher > 0.0f ? ptx::ex2_approx_ftz(-higher) : 1.0f;  // NaN where no part has seen a key
  }
};

// Returns the union of `count` parts, of which part p has the statistics load(p). All lanes call this; each of `lanes`
// looks at every so manieth part.
template <class element, int lanes, class Load>
inline RowUnion<element> unite(int count, float scale, Load&& load) {
  using Statistics = Softmax<element, 1>;
  const int lane = int(tile::lane()) % lanes;
  float top = -infinity, steep_base = -infinity;
#pragma unroll 1
  for (int p = lane; p < count; p += lanes) {
    const float2 part = load(p);
    top = fmaxf(top, Statistics::top(part.x, part.y, scale));
    if (Statistics::is_steep(part.y)) steep_base = fmaxf(steep_base, part.x);
  }
#pragma unroll
  for (int step = 1; step < lanes; step *= 2) {
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
    steep_base = fmaxf(steep_base, __shfl_xor_sync(0xffffffffu, steep_base, step));
  }
  const bool steep = steep_base > -infinity && Statistics::exponent_of(steep_base, scale) >= top;
  RowUnion<element> row{steep ? steep_base : top + Statistics::shift, Statistics::signed_sum(0.0f, steep)};
  float sum = 0.0f;
#pragma unroll 1
  for (int p = lane; p < count; p += lanes) {
    const float2 part = load(p);
    sum = fmaf(row.factor(part, scale), fabsf(part.y), sum);
  }
#pragma unroll
  for (int step = 1; step < lanes; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  row.sum = Statistics::signed_sum(sum, steep);
  return row;
}

// Sets a row's sums to those of `count` parts, and returns their union. `row` is counted from the tile's first. `ahead`
// loads are under way at a time.
template <class element, int lanes, int ahead, int cols, class Parts>
inline RowUnion<element> merge_row(LaneSums<cols>& merged, const Parts& parts, int count, int row, float scale) {
  const auto load = [&](int p) { return parts.statistics(p, row); };
  const RowUnion<element> whole = unite<element, lanes>(count, scale, load);
#pragma unroll
  for (int c = 0; c < LaneSums<cols>::count; ++c) {
    const int quad = 32 * c + tile::lane();
    float (&x)[4] = merged.x[c];
    x[0] = x[1] = x[2] = x[3] = 0.0f;
    // A warp's lanes know the factors of `lanes` parts at a time.
#pragma unroll 1
    for (int first = 0; first < count; first += lanes) {
      const int own = first + int(tile::lane()) % lanes, end = min_of(lanes, count - first);
      const float factor = own < count ? whole.factor(load(own), scale) : 0.0f;
#pragma unroll 1
      for (int p = 0; p < end; p += ahead) {
        uint4 sums[ahead];
#pragma unroll
        for (int a = 0; a < ahead; ++a) {
          if (p + a < end && quad < LaneSums<cols>::quads) sums[a] = parts.sums(first + p + a, row, quad);
        }
#pragma unroll
        for (int a = 0; a < ahead; ++a) {
          const float its = __shfl_sync(0xffffffffu, factor, p + a);
          if (p + a >= end || quad >= LaneSums<cols>::quads) continue;
          x[0] = fmaf(its, __uint_as_float(sums[a].x), x[0]);
          x[1] = fmaf(its, __uint_as_float(sums[a].y), x[1]);
          x[2] = fmaf(its, __uint_as_float(sums[a].z), x[2]);
          x[3] = fmaf(its, __uint_as_float(sums[a].w), x[3]);
        }
      }
    }
  }
  return whole;
}

// Sets a row's sums to those of parts `first`, `first + step` and so on of `count`.
template <class element, int cols, int lanes, class Parts>
inline void add_parts(LaneSums<cols, lanes>& merged, const Parts& parts, const RowUnion<element>& whole, int first,
                      int step, int count, int row, float scale) {
  using Sums = LaneSums<cols, lanes>;
#pragma unroll
  for (int c = 0; c < Sums::count; ++c) merged.x[c][0] = merged.x[c][1] = merged.x[c][2] = merged.x[c][3] = 0.0f;
  constexpr int unroll = max_of(1, 8 / Sums::count);  // loads that are under way at a time
#pragma unroll unroll
  for (int p = first; p < count; p += step) {
    uint4 sums[Sums::count];
#pragma unroll
    for (int c = 0; c < Sums::count; ++c) {
      const int quad = lanes * c + Sums::lane();
      if (quad < Sums::quads) sums[c] = parts.sums(p, row, quad);
    }
    const float its = whole.factor(parts.statistics(p, row), scale);
#pragma unroll
    for (int c = 0; c < Sums::count; ++c) {
      if (lanes * c + Sums::lane() >= Sums::quads) continue;
      float (&x)[4] = merged.x[c];
      x[0] = fmaf(its, __uint_as_float(sums[c].x), x[0]);
      x[1] = fmaf(its, __uint_as_float(sums[c].y), x[1]);
      x[2] = fmaf(its, __uint_as_float(sums[c].z), x[2]);
      x[3] = fmaf(its, __uint_as_float(sums[c].w), x[3]);
    }
  }
}

// The same by `lanes` lanes for each of a warp's rows, of which every one waits for the memory of a part only once;
// `unite_lanes` of them look at the statistics. Where rows are few and parts as well, latencies are all that counts.
template <class element, int unite_lanes, int cols, int lanes, class Parts>
inline RowUnion<element> merge_rows(LaneSums<cols, lanes>& merged, const Parts& parts, int count, int row,
                                    float scale) {
  const auto load = [&](int p) { return parts.statistics(p, row); };
  const RowUnion<element> whole = unite<element, unite_lanes>(count, scale, load);
  add_parts(merged, parts, whole, 0, 1, count, row, scale);
  return whole;
}

// The same for a single row of a warp: every `lanes` lanes take some of the parts, and all have the sums in the end.
template <class element, int cols, int lanes, class Parts>
inline RowUnion<element> merge_one_row(LaneSums<cols, lanes>& merged, const Parts& parts, int count, int row,
                                       float scale) {
  using Sums = LaneSums<cols, lanes>;
  const auto load = [&](int p) { return parts.statistics(p, row); };
  const RowUnion<element> whole = unite<element, 32>(count, scale, load);
  add_parts(merged, parts, whole, Sums::row(), 32 / lanes, count, row, scale);
#pragma unroll
  for (int step = lanes; step < 32; step *= 2) {
#pragma unroll
    for (int c = 0; c < Sums::count; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) merged.x[c][i] += __shfl_xor_sync(0xffffffffu, merged.x[c][i], step);
    }
  }
  return whole;
}

// Writes rows whose sums are complete, one for each `lanes` lanes, as far as they are `live`. A warp calls this.
template <class Config, int cols, int lanes, class Work>
inline void finish_row(const Params& params, const Work& work, int row, const RowUnion<ProbabilityOf<Config>>& whole,
                       const LaneSums<cols, lanes>& sums, float scale, bool live = true) {
  using Sums = LaneSums<cols, lanes>;
  using element = typename Config::element;
  using Statistics = Softmax<ProbabilityOf<Config>, 1>;
  const float sink = Config::sinks ? params.sinks[work.head_of(row) * params.sinks_stride] : -infinity;
  const float base = Statistics::settled(whole.base, Statistics::is_steep(whole.sum), scale);
  const float gain = Config::variant::gain(params.terms);
  const RowTotal total = Statistics::template total<Config::sinks>(base, fabsf(whole.sum), sink, gain);
  const float factor = total.factor * work.v_descale();
  NotFinite<element> not_finite;
  element* const out = work.out_row(params, row);
#pragma unroll
  for (int c = 0; c < Sums::count; ++c) {
    const int quad = lanes * c + Sums::lane();
    if (quad >= Sums::quads || !live) break;
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = sums.x[c][i] * factor;
    if constexpr (is_same<element, f32>) {
      not_finite.look(x[0], x[1]);
      not_finite.look(x[2], x[3]);
      const uint4 words{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
      tile::store_chunk<Config::store_bytes, Config::head_dim_v>(out, params.out_strides.dim, quad, words);
    } else {
      const uint2 words{ptx::cvt_rn_x2<element>(x[0], x[1]), ptx::cvt_rn_x2<element>(x[2], x[3])};
      not_finite.look(words.x, words.y);
      tile::store_chunk<Config::store_bytes, Config::head_dim_v>(out, params.out_strides.dim, quad, words);
    }
  }
  if (params.lse != nullptr && Sums::lane() == 0 && live) *work.lse_row(params, row) = total.lse;
  if (unlikely(__any_sync(0xffffffffu, not_finite.found()))) {
#pragma unroll 1
    for (int lane = 0; lane < 32; lane += lanes) {  // repair passes by what is finite
      if (__shfl_sync(0xffffffffu, int(live), lane))
        repair<Config>(params, work, __shfl_sync(0xffffffffu, row, lane), 1);
    }
  }
}

// What thread blocks leave in memory. A block has two places: 0 for an item that an earlier block began, and 1 for one
// that it begins and leaves to later ones; or, where blocks have no more than one item each, one place. Of a tile of
// `rows` rows these are the sums, and then the statistics.
template <int rows, int cols>
struct Partials {
  static constexpr int floats = rows * (cols + 2);

  float* memory;
  bool one_place;

  float* at(int block, int first) const {
    return memory + i64(one_place ? block : 2 * block + (block == first)) * floats;
  }

  template <class element, int lanes>
  void store(int block, int first, int row, const RowUnion<element>& whole, const LaneSums<cols, lanes>& sums) const {
    using Sums = LaneSums<cols, lanes>;
    float* const place = at(block, first);
#pragma unroll
    for (int c = 0; c < Sums::count; ++c) {
      const int quad = lanes * c + Sums::lane();
      const float (&x)[4] = sums.x[c];
      if (quad < Sums::quads) {
        reinterpret_cast<float4*>(place + row * cols)[quad] = float4{x[0], x[1], x[2], x[3]};
      }
    }
    if (Sums::lane() == 0) reinterpret_cast<float2*>(place + rows * cols)[row] = float2{whole.base, whole.sum};
  }
};

// The parts of an item that thread blocks from `first` on have left.
template <int rows, int cols>
struct LeftParts {
  Partials<rows, cols> partials;
  int first;

  float2 statistics(int part, int row) const {
    return reinterpret_cast<const float2*>(partials.at(first + part, first) + rows * cols)[row];
  }
  uint4 sums(int part, int row, int quad) const {
    return reinterpret_cast<const uint4*>(partials.at(first + part, first) + row * cols)[quad];
  }
};

}  // namespace attention
