// attention: where the scores are that a thread holds: of which rows, and which of their columns are seen.
#pragma once

#include "attention/blocks.cuh"
#include "attention/masks.cuh"
#include "attention/params.cuh"
#include "attention/seqlen.cuh"
#include "attention/term.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// A row of scores: a query. Columns, which are keys, are counted from the thread's first. `keep` asks a term that drops
// for masks of 16 columns of the thread's rows of an m-tile, of which this is the first.
template <class Config>
struct QueryRow {
  using Mask = typename Config::mask;
  static constexpr bool along_keys = true;  // whether columns are keys

  int batch, head, query, key;
  float distance;   // of the thread's first key
  int first, last;  // the columns that the query sees, so that comparisons are with constants
  bool live;
  int live_keys;  // how many keys there are from the thread's first on
  int diagonal;

  bool sees(int col) const { return !(col > last || (Mask::hides_first && col < first)); }

  // The columns [first, end) that the query sees, of those within bounds of a block in which the row's first column is
  // column `from`.
  int first_within(const Bounds& bounds, int from) const {
    return Mask::hides_first ? max_of(first, bounds.first() - from) : bounds.first() - from;
  }
  int end_within(const Bounds& bounds, int from) const { return min_of(last + 1, bounds.end() - from); }

  Point at(int col) const {
    return {batch, head, query, key + col, distance - float(col), live && col < live_keys, diagonal, 0, col};
  }

  template <class Term>
  void keep(u32 (&masks)[4], const Term& term, int col) const {
    term.keep(masks, Term::query_word(query), Term::key_word(key) + col / 4);
  }

  // Draws for columns 16 s to 16 s + 15 of the same rows: below[2 c + r] ← masks of whether numbers of columns 8 c and
  // 8 c + 1 of row r are below the bound.
  template <class Term>
  void draw(u32 (&below)[4], const Term& term, int s) const {
    term.compare(below, Term::query_word(query), Term::key_word(key) + 4 * s);
  }

  // What was drawn is the thread's own.
  static u32 own(u32 drawn) { return drawn; }
};

// A row of transposed scores: a key. Columns are queries.
template <class Config>
struct KeyRow {
  using Mask = typename Config::mask;
  static constexpr bool along_keys = false;

  int batch, head, query, key;
  float distance;   // of the thread's first query
  int first, last;  // the columns of the queries that see the key; if the first is Config::block_m, none does
  bool live;
  int live_queries;
  int diagonal;

  bool sees(int col) const { return col >= first && (!Mask::hides_first || col <= last); }

  int first_within(const Bounds& bounds, int from) const { return max_of(first, bounds.first() - from); }
  int end_within(const Bounds& bounds, int from) const {
    return Mask::hides_first ? min_of(last + 1, bounds.end() - from) : bounds.end() - from;
  }

  Point at(int col) const {
    return {batch, head, query + col, key, distance + float(col), live && col < live_queries, diagonal, col};
  }

  // The same, but a lane draws one of columns 8 c and 8 c + 1, the second if its key is odd, for that and the other of
  // two keys, of which two lanes have one each: halves of masks are of the even key and of the odd one.
  template <class Term>
  void draw(u32 (&below)[4], const Term& term, int s) const {
    u32 by_keys[4];
    term.compare(by_keys, Term::query_word(query + key % 2) + 8 * s, Term::key_word(key));
#pragma unroll
    for (int x = 0; x < 4; ++x) below[x] = by_keys[2 * (x % 2) + x / 2];
  }

  // The bits of the thread's own key, of the first column in the low half, where every lane of a warp hands in what it
  // has drawn: two lanes trade halves.
  u32 own(u32 drawn) const {
    return __byte_perm(drawn, __shfl_xor_sync(0xffffffffu, drawn, 4), key % 2 ? 0x3276 : 0x5410);
  }
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

  // Where the first entry is.
  int query() const { return first_row / Config::pack; }
  int key() const { return first_key; }

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
            seqlen.k - key,
            seqlen.diagonal()};
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
             query < seqlen.q, seqlen.k - key, seqlen.diagonal()},
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

  int query() const { return first_query; }
  int key() const { return first_key; }

  Row row(int t, int i) const {
    using Mask = typename Config::mask;
    const int key = first_key + tile::fragment_row(t, i), query = first_query + tile::fragment_col();
    const int own = key - seqlen.diagonal() - query;  // the column of the query at the key's own position
    int first = 0, last = 0;
    if constexpr (Mask::hides_last) first = Mask::first_query(params, own);
    if constexpr (Mask::hides_first) last = Mask::last_query(params, own);
    const bool live = key < seqlen.k;
    return {batch,
            head,
            query,
            key,
            float(query + seqlen.diagonal() - key),
            live ? first : Config::block_m,
            last,
            live,
            seqlen.q - query,
            seqlen.diagonal()};
  }
};

}  // namespace attention
