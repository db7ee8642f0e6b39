// attention: what lies between the products of the main loops: from scores to probabilities, and from the gradients of
// these to those of scores. All main loops, forward and backward, come here; what differs is which way a tile lies.
#pragma once

#include "attention/kept.cuh"
#include "attention/loaded.cuh"
#include "attention/masks.cuh"
#include "attention/params.cuh"
#include "attention/place.cuh"
#include "attention/seqlen.cuh"
#include "attention/variant.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/math.cuh"
#include "ptx/shared.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// Stands for a row that is not asked for.
struct NoRow {};

// Calls step(row, t, i, j) for every pair of entries (t, j, 2 i) and (t, j, 2 i + 1) that a thread holds. Where rows
// are asked for, all pairs of one come before those of the next, since a row takes registers.
template <bool asked, int m_tiles, int cols, class Place, class Step>
inline void for_each_pair(const Place& place, Step&& step) {
  if constexpr (asked) {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const typename Place::Row row = place.row(t, i);
#pragma unroll
        for (int j = 0; j < cols / 8; ++j) step(row, t, i, j);
      }
    }
  } else {
    tile::for_each_pair<m_tiles, cols>([&](int t, int i, int j) { step(NoRow{}, t, i, j); });
  }
}

// Calls step(x, row, column) for every entry x that a thread holds.
template <class Place, int m_tiles, int cols, class Step>
inline void for_each_entry(tile::Accumulator<m_tiles, cols>& entries, const Place& place, Step&& step) {
  for_each_pair<true, m_tiles, cols>(place, [&](const auto& row, int t, int i, int j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) step(entries.x[t][j][2 * i + e], row, 8 * j + e);
  });
}

// Entries of scores that a query does not see ← -infinity. This is for blocks that are not seen whole.
template <class Variant, class Place, int m_tiles, int cols>
inline void mask(const Variant& variant, tile::Accumulator<m_tiles, cols>& scores, const Place& place) {
  if constexpr (Variant::hides && !Variant::hides_in_full) {
    Variant inside = variant;
    inside.enter(place.query(), place.key());
    // So the compiler sees that the first key is a multiple of the tile's, and columns in the same word of bits.
    Place at = place;
    if constexpr (Place::Row::along_keys) at.first_key &= -(cols & -cols);
    for_each_entry(scores, at, [&](float& s, const auto& row, int col) {
      if (!row.sees(col) | !inside.keeps_within(row.at(col))) s = -infinity;  // no branch around what is loaded once
    });
  } else {
    for_each_entry(scores, place, [](float& s, const auto& row, int col) {
      if (!row.sees(col)) s = -infinity;
    });
  }
}

// Bits of those of a thread's entries of a row that lie in its first `end` columns, which are counted from the thread's
// first. Entries are in order, the first in the lowest bit.
template <int cols>
constexpr u32 entries_before(int end) {
  static_assert(cols <= 128, "a word has a bit for each entry");
  const int within = min_of(max_of(end, 0), cols), entries = within / 8 * 2 + min_of(within % 8, 2);
  return u32((u64(1) << entries) - 1);
}

// The same of a block of a list, by the bounds of the thread's two rows. The first column of the tile is column `from`
// of the listed block.
template <class Place, int cols>
inline void mask_within(tile::Accumulator<1, cols>& scores, const Place& place, const Bounds (&bounds)[2], int from) {
  from += tile::fragment_col();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const typename Place::Row row = place.row(0, i);
    // Many bits become predicates in one instruction, where comparing with both bounds would be two for each entry.
    const u32 seen = entries_before<cols>(row.end_within(bounds[i], from)) &
                     ~entries_before<cols>(row.first_within(bounds[i], from));
#pragma unroll
    for (int j = 0; j < cols / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (!(seen >> (2 * j + e) & 1)) scores.x[0][j][2 * i + e] = -infinity;
      }
    }
  }
}

template <class Place, int m_tiles, int cols>
inline void mask(tile::Accumulator<m_tiles, cols>& scores, const Place& place) {
  mask(Variant<>(nullptr, 0, 0), scores, place);
}

// The same before the gradients of a tile, where no term shapes scores; else `probabilities` masks.
template <class Config, class Place, int m_tiles, int cols>
inline void mask_unshaped(tile::Accumulator<m_tiles, cols>& scores, const Place& place, bool boundary) {
  using Variant = typename Config::variant;
  if (!Variant::shapes && unlikely(boundary)) mask(Variant(place.params, place.batch, place.head), scores, place);
}

// The factor that takes what apply() leaves in a tile to exponents of 2. Where no term shapes scores, the scale rides
// in the softmax's multiply-add and apply() does nothing.
template <class Variant>
inline float exponent_scale(const Params& params) {
  return Variant::shapes ? log2_e : params.exponent_scale;
}

// The same where keys are to be multiplied by a number.
template <class Variant>
inline float exponent_scale(const Params& params, float k_descale) {
  return Variant::shapes ? log2_e : params.exponent_scale * k_descale;
}

// x ← what the terms of a row, all of its tile or its own, make of two neighbouring entries, those of columns `col` and
// col + 1, which `scale` is still to be multiplied to; -infinity where one hides the key.
template <class Variant, class Row>
inline void shape_pair(const Variant& variant, float (&x)[4], int i, float scale, const Row& row, int col,
                       const typename Variant::Loaded& loaded) {
  float s[2] = {x[2 * i], x[2 * i + 1]};
  variant.begin_pair(s, scale);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const Point at = row.at(col + e);
    const float score = variant.finish_one(s[e], at, loaded, e);
    x[2 * i + e] = Variant::hides_in_full && !variant.keeps(at, loaded, e) ? -infinity : score;
  }
}

// Scores ← what the variant's terms make of them, and -infinity where a term hides the key. What terms hide that hide
// nothing in blocks that are seen whole, `mask` does.
template <class Variant, class Place, int m_tiles, int cols, class Loads = LoadedNow>
inline void apply(const Variant& variant, tile::Accumulator<m_tiles, cols>& scores, const Place& place,
                  const Loads& loads = {}) {
  if constexpr (Variant::shapes) {
    for_each_pair<true, m_tiles, cols>(place, [&](const auto& row, int t, int i, int j) {
      const auto& loaded = loads.of(variant, row, t, i, j);
      shape_pair(variant, scores.x[t][j], i, place.params.softmax_scale, row, 8 * j, loaded);
    });
  }
}

// The same where rows have terms of their own.
template <class Config, int cols>
inline void apply(tile::Accumulator<1, cols>& scores, const OwnRowsPlace<Config>& place) {
  if constexpr (Config::variant::shapes) {
    for_each_pair<true, 1, cols>(place, [&](const auto& row, int t, int i, int j) {
      const auto& loaded = LoadedNow::of(row.variant, row, t, i, j);
      shape_pair(row.variant, scores.x[t][j], i, place.params.softmax_scale * place.k_descale, row, 8 * j, loaded);
    });
  }
}

// Probabilities ← what V is multiplied by, but for the gain.
template <class Variant, class Place, int m_tiles, int cols>
inline void weigh(const Variant& variant, tile::Accumulator<m_tiles, cols>& probabilities, const Place& place) {
  if constexpr (Variant::weighs) {
    for_each_entry(probabilities, place, [&](float& p, const auto& row, int col) { p *= variant.weight(row.at(col)); });
  }
  if constexpr (Variant::drops) drop(variant.dropping(), probabilities, place);
}

template <class Config, int cols>
inline void weigh(tile::Accumulator<1, cols>& probabilities, const OwnRowsPlace<Config>& place) {
  using Variant = typename Config::variant;
  if constexpr (Variant::weighs) {
    for_each_entry(probabilities, place,
                   [&](float& p, const auto& row, int col) { p *= row.variant.weight(row.at(col)); });
  }
  if constexpr (Variant::drops) drop_by_row(probabilities, place);
}

// The same of an accumulator of one m-tile: entry by entry, weight(i, column, probability), and then of what is packed
// of columns 16 s to 16 s + 15.
template <class Variant, class Place>
struct Weights {
  const Variant& variant;
  typename Place::Row rows[2];

  Weights(const Variant& variant, const Place& place) : variant(variant), rows{place.row(0, 0), place.row(0, 1)} {}

  float operator()(int i, int col, float p) const { return Variant::weighs ? p * variant.weight(rows[i].at(col)) : p; }

  void drop(u32 (&packed)[4], int s) const {
    if constexpr (Variant::drops) {
      u32 masks[4];
      rows[0].keep(masks, variant.dropping(), 16 * s);
#pragma unroll
      for (int x = 0; x < 4; ++x) packed[x] &= masks[x];
    }
  }
};

struct NoWeights {
  float operator()(int, int, float p) const { return p; }
  void drop(u32 (&)[4], int) const {}
};

template <class Variant, class Place>
inline auto weights(const Variant& variant, const Place& place) {
  if constexpr (Variant::scales)
    return Weights<Variant, Place>(variant, place);
  else
    return NoWeights{};
}

// The lse or delta of the query of each column of transposed scores that a thread holds. These numbers are loaded ahead
// of products, since any access to shared memory after a product waits until the tensor cores have begun the product.
template <int cols>
struct ColumnNumbers {
  static constexpr int pairs = cols / 8;
  float2 x[pairs];

  // Loads pairs [first, last) of this thread's; the tile's numbers lie at shared address `numbers`.
  void load(u32 numbers, int first = 0, int last = pairs) {
    const u32 address = numbers + tile::fragment_col() * sizeof(float);
#pragma unroll
    for (int j = first; j < last; ++j) x[j] = ptx::ld_shared_f32x2(address + 8 * j * sizeof(float));
  }

  float2 of(int, int, int j) const { return x[j]; }
};

// The lse or delta of the query of each row that a thread holds.
template <int m_tiles>
struct RowNumbers {
  float x[m_tiles][2];

  float2 of(int t, int i, int) const { return {x[t][i], x[t][i]}; }
};

// What is made of two neighbouring entries of scores: what dout is multiplied by, which is P unless a term scales it;
// what dP - delta is multiplied by, which is P times derivatives; and what is multiplied to that once terms have had
// their gradients.
struct ScorePair {
  float weight[2], ds_factor[2], rest[2];
};

// Calls emit(t, i, j, pair) for every pair of entries (t, j, 2 i) and (t, j, 2 i + 1) of the scores that a thread
// holds. Where no term shapes scores, they come masked. Else they come as they are, and this function masks what terms
// make of them: neither terms nor their derivatives are to meet infinities. `boundary` is whether not all of the tile
// is seen by all.
template <class Config, class Place, int m_tiles, int cols, class Drops, class Numbers, class Emit,
          class Loads = LoadedNow>
inline void probabilities(const tile::Accumulator<m_tiles, cols>& scores, const Place& place, const Drops& kept,
                          const Numbers& lse, bool boundary, Emit&& emit, const Loads& loads = {}) {
  using Variant = typename Config::variant;
  Variant variant(place.params, place.batch, place.head);
  if (Variant::shapes && Variant::hides && boundary) variant.enter(place.query(), place.key());
  const float scale = exponent_scale<Variant>(place.params);
  for_each_pair<Variant::shapes || Variant::weighs, m_tiles, cols>(place, [&](const auto& row, int t, int i, int j) {
    const float2 subtracted = lse.of(t, i, j);
    const auto& loaded = loads.of(variant, row, t, i, j);
    ScorePair pair;
    float s[2] = {scores.x[t][j][2 * i], scores.x[t][j][2 * i + 1]};
    // A key that a query does not see is not to change the bits of the key beside it.
    if constexpr (Variant::pairs && Place::Row::along_keys) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (!row.sees(8 * j + e)) s[e] = 0.0f;
      }
    }
    if constexpr (Variant::shapes) variant.begin_pair(s, place.params.softmax_scale);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float exponent = s[e], weight = 1.0f;
      Derivatives derivatives;
      // Derivatives need the registers that a whole tile of terms' scores would take, so terms are applied score by
      // score.
      if constexpr (Variant::shapes) {
        const Point at = row.at(8 * j + e);
        exponent = variant.finish_one(s[e], at, loaded, e, derivatives);
        bool hidden = !row.sees(8 * j + e);
        if constexpr (Variant::hides_in_full)
          hidden = hidden || !variant.keeps(at, loaded, e);
        else if constexpr (Variant::hides)
          hidden = hidden || (boundary && !variant.keeps_within(at));
        if (hidden) exponent = -infinity;
        if (Variant::wild && exponent == -infinity) derivatives = {};  // times a probability of 0
      }
      if constexpr (Variant::weighs) weight = variant.weight(row.at(8 * j + e));
      const float p = ptx::ex2_approx_ftz(fmaf(exponent, scale, -(e == 0 ? subtracted.x : subtracted.y)));
      // A product, since a NaN is to reach dv.
      pair.weight[e] = p * weight * kept.factor(t, i, j, e);
      pair.ds_factor[e] = p * derivatives.after;
      pair.rest[e] = derivatives.before;
    }
    emit(t, i, j, pair);
  });
}

// Calls emit(t, i, j, low, high) with two neighbouring entries of dS, of which ds_factors(t, i, j) and rests(t, i, j)
// are what `probabilities` gave. If `for_terms`, terms get their gradients, for which a variant that reads scores needs
// those that `probabilities` took: scores(t, i, j).
template <class Config, bool for_terms, class Place, int m_tiles, int cols, class Numbers, class Scores,
          class DsFactors, class Rests, class Emit>
inline void gradients(const tile::Accumulator<m_tiles, cols>& dp, const Place& place,
                      const Kept<Config, m_tiles, cols>& kept, const Numbers& delta, Scores&& scores,
                      DsFactors&& ds_factors, Rests&& rests, Emit&& emit) {
  using Variant = typename Config::variant;
  const Variant variant(place.params, place.batch, place.head);
  constexpr bool tells = Variant::has_gradient && for_terms;
  const float gain = Variant::gain(place.params.terms);
  tile::Accumulator<m_tiles, cols> told;  // for terms that gather
  for_each_pair<Variant::weighs || tells, m_tiles, cols>(place, [&](const auto& row, int t, int i, int j) {
    const float2 subtracted = delta.of(t, i, j), ds_factor = ds_factors(t, i, j);
    float2 d{dp.x[t][j][2 * i], dp.x[t][j][2 * i + 1]};
    if constexpr (Variant::weighs) {
      d.x *= variant.weight(row.at(8 * j));
      d.y *= variant.weight(row.at(8 * j + 1));
    }
    if constexpr (Variant::drops) d = {kept.kept_or_0(d.x, t, i, j, 0), kept.kept_or_0(d.y, t, i, j, 1)};
    float2 ds{ds_factor.x * (d.x * gain - subtracted.x), ds_factor.y * (d.y * gain - subtracted.y)};
    if constexpr (tells) {
      const Point low = row.at(8 * j), high = row.at(8 * j + 1);
      const auto tell = [&](float dscored, const Point& at, int e) {
        if constexpr (Variant::reads_score) {
          const float2 s = scores(t, i, j);
          variant.gradient(dscored, at, (e == 0 ? s.x : s.y) * place.params.softmax_scale);
        } else {
          variant.gradient(dscored, at);
        }
      };
      const bool tells_low = low.live && row.sees(8 * j) && variant.keeps(low);
      const bool tells_high = high.live && row.sees(8 * j + 1) && variant.keeps(high);
      if (tells_low) tell(ds.x, low, 0);
      if (tells_high) tell(ds.y, high, 1);
      if constexpr (Variant::gathers) {
        told.x[t][j][2 * i] = tells_low ? ds.x : 0.0f;
        told.x[t][j][2 * i + 1] = tells_high ? ds.y : 0.0f;
      }
    }
    if constexpr (Variant::holds) {
      const float2 rest = rests(t, i, j);
      ds.x *= rest.x;
      ds.y *= rest.y;
    }
    emit(t, i, j, ds.x, ds.y);
  });
  if constexpr (tells) variant.flush();
  if constexpr (tells && Variant::gathers) variant.gather(told, place);
}

}  // namespace attention
