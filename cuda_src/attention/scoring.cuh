// attention: what lies between the products of the main loops: from scores to probabilities, and from the gradients of
// these to those of scores. All main loops, forward and backward, come here; what differs is which way a tile lies.
#pragma once

#include "attention/masks.cuh"
#include "attention/params.cuh"
#include "attention/seqlen.cuh"
#include "attention/variant.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/math.cuh"
#include "ptx/shared.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// A row of scores: a query. Columns, which are keys, are counted from the thread's first.
template <class Config>
struct QueryRow {
  using Mask = typename Config::mask;

  int batch, head, query, key;
  float distance;   // of the thread's first key
  int first, last;  // the columns that the query sees, so that comparisons are with constants
  bool live;
  int live_keys;  // how many keys there are from the thread's first on

  bool sees(int col) const { return !(col > last || (Mask::hides_first && col < first)); }

  Point at(int col) const { return {batch, head, query, key + col, distance - float(col), live && col < live_keys}; }
};

// A row of transposed scores: a key. Columns are queries.
template <class Config>
struct KeyRow {
  using Mask = typename Config::mask;

  int batch, head, query, key;
  float distance;   // of the thread's first query
  int first, last;  // the columns of the queries that see the key; if the first is Config::block_m, none does
  bool live;
  int live_queries;

  bool sees(int col) const { return col >= first && (!Mask::hides_first || col <= last); }

  Point at(int col) const { return {batch, head, query + col, key, distance + float(col), live && col < live_queries}; }
};

// Where a warp's accumulator of scores lies. The thread's rows are those of the accumulator.
template <class Config>
struct Place {
  using Row = QueryRow<Config>;

  const Params& params;
  const Seqlen& seqlen;
  int batch, head;  // of q, or, where heads share a tile, of k
  int first_row;    // of the first row, counted from row 0 of the head's first tile
  int first_key;    // of the first column

  Row row(int t, int i) const {
    using Mask = typename Config::mask;
    const int row = first_row + tile::fragment_row(t, i), key = first_key + tile::fragment_col();
    const int query = row / Config::pack;
    return {batch,
            head * Config::pack + row % Config::pack,
            query,
            key,
            float(query + seqlen.diagonal() - key),
            Mask::first_key(params, seqlen, query) - key,
            Mask::last_key(params, seqlen, query) - key,
            query < seqlen.q,
            seqlen.k - key};
  }
};

// A query row with terms of its own: other rows of its tile are of other heads.
template <class Config>
struct OwnRow : QueryRow<Config> {
  const typename Config::variant& variant;
};

// What the thread's two rows are of a tile that any number of heads share.
template <class Config>
struct OwnRows {
  int query[2], head[2];
  typename Config::variant variant[2];

  // `work` says of which head and query a row of the tile is; the thread's first is `row`, the other `row` + 8.
  template <class Work>
  OwnRows(const Params& params, const Work& work, int row)
      : query{work.query_of(row), work.query_of(row + 8)},
        head{work.head_of(row), work.head_of(row + 8)},
        variant{{params, work.batch(), head[0]}, {params, work.batch(), head[1]}} {}
};

// Where a warp's scores lie in such a tile.
template <class Config>
struct OwnRowsPlace {
  using Row = OwnRow<Config>;

  const Params& params;
  const Seqlen& seqlen;
  const OwnRows<Config>& rows;
  int batch;
  int first_key;    // of the first column
  float k_descale;  // what keys are to be multiplied by

  Row row(int, int i) const {
    using Mask = typename Config::mask;
    const int query = rows.query[i], key = first_key + tile::fragment_col();
    return {{batch, rows.head[i], query, key, float(query + seqlen.diagonal() - key),
             Mask::first_key(params, seqlen, query) - key, Mask::last_key(params, seqlen, query) - key,
             query < seqlen.q, seqlen.k - key},
            rows.variant[i]};
  }
};

// The same of transposed scores.
template <class Config>
struct TransposedPlace {
  using Row = KeyRow<Config>;

  const Params& params;
  const Seqlen& seqlen;
  int batch, head;
  int first_key;    // of the first row
  int first_query;  // of the first column

  Row row(int t, int i) const {
    using Mask = typename Config::mask;
    const int key = first_key + tile::fragment_row(t, i), query = first_query + tile::fragment_col();
    const int own = key - seqlen.diagonal() - query;  // the column of the query at the key's own position
    int first = 0, last = 0;
    if constexpr (Mask::hides_last) first = Mask::first_query(params, own);
    if constexpr (Mask::hides_first) last = Mask::last_query(params, own);
    const bool live = key < seqlen.k;
    return {batch, head, query,           key, float(query + seqlen.diagonal() - key), live ? first : Config::block_m,
            last,  live, seqlen.q - query};
  }
};

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

// Entries of scores that a query does not see ← -infinity.
template <class Place, int m_tiles, int cols>
inline void mask(tile::Accumulator<m_tiles, cols>& scores, const Place& place) {
  for_each_entry(scores, place, [](float& s, const auto& row, int col) {
    if (!row.sees(col)) s = -infinity;
  });
}

// The factor that takes what apply() leaves in a tile to exponents of 2. Without terms the scale rides in the softmax's
// multiply-add and apply() does nothing.
template <class Variant>
inline float exponent_scale(const Params& params) {
  return Variant::empty ? params.exponent_scale : log2_e;
}

// The same where keys are to be multiplied by a number.
template <class Variant>
inline float exponent_scale(const Params& params, float k_descale) {
  return Variant::empty ? params.exponent_scale * k_descale : log2_e;
}

// Scores ← what the variant's terms make of them.
template <class Variant, class Place, int m_tiles, int cols>
inline void apply(const Variant& variant, tile::Accumulator<m_tiles, cols>& scores, const Place& place) {
  if constexpr (!Variant::empty) {
    for_each_entry(scores, place, [&](float& s, const auto& row, int col) {
      s = variant.score(s * place.params.softmax_scale, row.at(col));
    });
  }
}

// The same where rows have terms of their own.
template <class Config, int cols>
inline void apply(tile::Accumulator<1, cols>& scores, const OwnRowsPlace<Config>& place) {
  if constexpr (!Config::variant::empty) {
    for_each_entry(scores, place, [&](float& s, const auto& row, int col) {
      s = row.variant.score(s * (place.params.softmax_scale * place.k_descale), row.at(col));
    });
  }
}

// Probabilities ← what V is multiplied by.
template <class Variant, class Place, int m_tiles, int cols>
inline void weigh(const Variant& variant, tile::Accumulator<m_tiles, cols>& probabilities, const Place& place) {
  if constexpr (Variant::scales) {
    for_each_entry(probabilities, place, [&](float& p, const auto& row, int col) { p *= variant.factor(row.at(col)); });
  }
}

template <class Config, int cols>
inline void weigh(tile::Accumulator<1, cols>& probabilities, const OwnRowsPlace<Config>& place) {
  if constexpr (Config::variant::scales) {
    for_each_entry(probabilities, place,
                   [&](float& p, const auto& row, int col) { p *= row.variant.factor(row.at(col)); });
  }
}

// The same, entry by entry, of an accumulator of one m-tile: weight(i, column, probability).
template <class Variant, class Place>
struct Weights {
  const Variant& variant;
  typename Place::Row rows[2];

  Weights(const Variant& variant, const Place& place) : variant(variant), rows{place.row(0, 0), place.row(0, 1)} {}
  float operator()(int i, int col, float p) const { return p * variant.factor(rows[i].at(col)); }
};

struct NoWeights {
  float operator()(int, int, float p) const { return p; }
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
// holds. Without terms the scores come masked. With terms they come as they are, and this function masks what the terms
// make of them: neither terms nor their derivatives are to meet infinities.
template <class Config, class Place, int m_tiles, int cols, class Numbers, class Emit>
inline void probabilities(const tile::Accumulator<m_tiles, cols>& scores, const Place& place, const Numbers& lse,
                          Emit&& emit) {
  using Variant = typename Config::variant;
  const Variant variant(place.params, place.batch, place.head);
  const float scale = exponent_scale<Variant>(place.params);
  for_each_pair<!Variant::empty, m_tiles, cols>(place, [&](const auto& row, int t, int i, int j) {
    const float2 subtracted = lse.of(t, i, j);
    ScorePair pair;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float s = scores.x[t][j][2 * i + e];
      float exponent = s, weight = 1.0f;
      Derivatives derivatives;
      // Derivatives need the registers that a whole tile of terms' scores would take, so terms are applied score by
      // score.
      if constexpr (!Variant::empty) {
        const Point at = row.at(8 * j + e);
        exponent = variant.score(s * place.params.softmax_scale, at, derivatives);
        if (!row.sees(8 * j + e)) exponent = -infinity;
        if (Variant::scales) weight = variant.factor(at);
      }
      const float p = ptx::ex2_approx_ftz(fmaf(exponent, scale, -(e == 0 ? subtracted.x : subtracted.y)));
      pair.weight[e] = p * weight;
      pair.ds_factor[e] = p * derivatives.after;
      pair.rest[e] = derivatives.before;
    }
    emit(t, i, j, pair);
  });
}

// Calls emit(t, i, j, low, high) with two neighbouring entries of dS, of which ds_factors(t, i, j) and rests(t, i, j)
// are what `probabilities` gave. If `for_terms`, terms get their gradients.
template <class Config, bool for_terms, class Place, int m_tiles, int cols, class Numbers, class DsFactors, class Rests,
          class Emit>
inline void gradients(const tile::Accumulator<m_tiles, cols>& dp, const Place& place, const Numbers& delta,
                      DsFactors&& ds_factors, Rests&& rests, Emit&& emit) {
  using Variant = typename Config::variant;
  const Variant variant(place.params, place.batch, place.head);
  constexpr bool tells = Variant::has_gradient && for_terms;
  for_each_pair<Variant::scales || tells, m_tiles, cols>(place, [&](const auto& row, int t, int i, int j) {
    const float2 subtracted = delta.of(t, i, j), ds_factor = ds_factors(t, i, j);
    float2 d{dp.x[t][j][2 * i], dp.x[t][j][2 * i + 1]};
    if constexpr (Variant::scales) {
      d.x *= variant.factor(row.at(8 * j));
      d.y *= variant.factor(row.at(8 * j + 1));
    }
    float2 ds{ds_factor.x * (d.x - subtracted.x), ds_factor.y * (d.y - subtracted.y)};
    if constexpr (tells) {
      const Point low = row.at(8 * j), high = row.at(8 * j + 1);
      if (low.live && row.sees(8 * j)) variant.gradient(ds.x, low);
      if (high.live && row.sees(8 * j + 1)) variant.gradient(ds.y, high);
    }
    if constexpr (Variant::keeps) {
      const float2 rest = rests(t, i, j);
      ds.x *= rest.x;
      ds.y *= rest.y;
    }
    emit(t, i, j, ds.x, ds.y);
  });
}

}  // namespace attention
