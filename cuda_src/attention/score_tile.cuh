// attention: the elements of a score array that a warp's tile of scores takes, loaded ahead of these. A load costs what
// it touches of rows, however little it takes of each. So lanes read as much of a row at once as its alignment allows,
// and exchange it afterwards.
#pragma once

#include "attention/score_array.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/movmatrix.cuh"
#include "ptx/thread.cuh"
#include "tile/quad.cuh"

namespace attention {

// How they are read: pair by pair of scores, or as below.
enum class ScoreReads { pairs, rows, turned };

template <class Array, bool along_keys>
constexpr ScoreReads score_reads() {
  if (along_keys) return Array::wide ? ScoreReads::rows : ScoreReads::pairs;
  return (Array::bytes == 2 && Array::paired) || (Array::bytes == 1 && Array::wide) ? ScoreReads::turned
                                                                                    : ScoreReads::pairs;
}

// Those for the term's pairs of entries (t, j, 2 i) and (t, j, 2 i + 1), where the tile is of m_tiles × 16 rows.
template <class Term, class Place, int m_tiles, int cols,
          ScoreReads = score_reads<typename Term::Array, Place::Row::along_keys>()>
struct ScoreTile {
  typename Term::Loaded x[m_tiles][2][cols / 8];

  void load(const Term& term, const Place& place) {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const typename Place::Row row = place.row(t, i);
#pragma unroll
        for (int j = 0; j < cols / 8; ++j) {
          x[t][i][j] = term.template load<Place::Row::along_keys>(row.at(8 * j), row.at(8 * j + 1));
        }
      }
    }
  }

  // Called by all lanes together, before they ask for what they have loaded.
  void arrange() {}

  typename Term::Loaded of(int t, int i, int j) const { return x[t][i][j]; }
};

// Of wide rows that are queries. A group of columns is as many as the four lanes of a quad read of a row at once, in
// words of 4 bytes: 4 each, or 2 or 1 of what is left.
template <class Term, class Place, int m_tiles, int cols>
struct ScoreTile<Term, Place, m_tiles, cols, ScoreReads::rows> {
  using Array = typename Term::Array;
  static constexpr int bytes = Array::bytes, words = cols * bytes / 16;  // of a row, in each lane
  static_assert(cols % 16 == 0, "the four lanes have as many words");

  u32 x[m_tiles][2][words];

  void load(const Term& term, const Place& place) {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const typename Place::Row row = place.row(t, i);
        const int keys = row.live ? term.array.keys_from(row.query, place.key(), place.seqlen.k) : 0;
        const char* const from = term.array.address(row.query, place.key());
        if (keys >= cols)
          load_row<true>(x[t][i], from, keys);
        else
          load_row<false>(x[t][i], from, keys);
      }
    }
  }

  void arrange() {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) deal_row(x[t][i]);
    }
  }

  typename Term::Loaded of(int t, int i, int j) const {
    if constexpr (bytes == 4)
      return {x[t][i][2 * j], x[t][i][2 * j + 1]};
    else if constexpr (bytes == 2)
      return {x[t][i][j]};
    else
      return {x[t][i][j / 2] >> 16 * (j % 2)};
  }

 private:
  // How many words of a lane are in the group that begins with its word `first`.
  static constexpr int together(int first) { return words - first >= 4 ? 4 : words - first >= 2 ? 2 : 1; }

  // Of a row that lies at `from`, and has so many keys; `whole` is whether these are all of the tile's.
  template <bool whole, int first = 0>
  static void load_row(u32 (&row)[words], const char* from, int keys) {
    if constexpr (first < words) {
      constexpr int n = together(first);
      const int own = ptx::laneid() % 4 * (4 * n);  // bytes
      const bool there = whole || (16 * first + own) / bytes < keys;
      load_words(reinterpret_cast<u32(&)[n]>(row[first]), from + own + 16 * first, there);
      load_row<whole, first + n>(row, from, keys);
    }
  }

  template <int first = 0>
  static void deal_row(u32 (&x)[words]) {
    if constexpr (first < words) {
      constexpr int n = together(first);
      if constexpr (bytes == 4) {
        tile::quad::deal(x[first], x[first + 2]);
        tile::quad::deal(x[first + 1], x[first + 3]);
      } else if constexpr (bytes == 2 && n == 4) {
        tile::quad::deal(x[first], x[first + 1], x[first + 2], x[first + 3]);
      } else if constexpr (bytes == 2) {
        tile::quad::deal(x[first], x[first + 1]);
      } else if constexpr (n == 4) {
        tile::quad::deal_halves(x[first], x[first + 1], x[first + 2], x[first + 3]);
      } else if constexpr (n == 2) {
        tile::quad::deal_halves(x[first], x[first + 1]);
      } else {
        tile::quad::deal_halves(x[first]);
      }
      deal_row<first + n>(x);
    }
  }
};

// Of rows that are keys. Lanes read rows of queries, 8 queries of 16 keys at a time, and a warp turns 8×8 elements with
// one instruction. Bytes are turned in pairs, those of keys 8 apart.
template <class Term, class Place, int m_tiles, int cols>
struct ScoreTile<Term, Place, m_tiles, cols, ScoreReads::turned> {
  using Array = typename Term::Array;
  static constexpr int bytes = Array::bytes;

  u32 x[m_tiles][cols / 8][bytes];

  void load(const Term& term, const Place& place) {
    const int query = place.query() + ptx::laneid() / 4;
    const int queries = term.array.queries_from(query, place.seqlen.q);
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
      const int key = place.key() + 16 * t, keys = term.array.keys_from(place.key(), place.seqlen.k) - 16 * t;
      const char* const from = term.array.address(query, key);
      if (queries > cols - 8 && keys >= 16)
        load_rows<true>(x[t], from, term.array.query_stride, queries, keys);
      else
        load_rows<false>(x[t], from, term.array.query_stride, queries, keys);
    }
  }

  void arrange() {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int j = 0; j < cols / 8; ++j) {
        u32(&words)[bytes] = x[t][j];
        if constexpr (bytes == 2) {
          if constexpr (Array::wide) tile::quad::deal(words[0], words[1]);
          words[1] = ptx::movmatrix_trans(words[1]);
        } else {
          tile::quad::deal_halves(words[0]);
          words[0] = __byte_perm(words[0], 0, 0x3120);  // keys 8 apart side by side
        }
        words[0] = ptx::movmatrix_trans(words[0]);
      }
    }
  }

  typename Term::Loaded of(int t, int i, int j) const {
    if constexpr (bytes == 2)
      return {x[t][j][i]};
    else
      return {__byte_perm(x[t][j][0], 0, i == 0 ? 0x4420 : 0x4431)};
  }

 private:
  // Of every eighth of so many queries, of which the first lies at `from`.
  template <bool whole>
  static void load_rows(u32 (&rows)[cols / 8][bytes], const char* from, i32 query_stride, int queries, int keys) {
    const int lane = ptx::laneid() % 4;
#pragma unroll
    for (int j = 0; j < cols / 8; ++j) {
      const char* const row = from + i64(8 * j) * query_stride;
      const bool there = whole || 8 * j < queries;
      if constexpr (Array::wide) {
        load_words(rows[j], row + lane * (4 * bytes), there && (whole || 4 * lane < keys));
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          u32(&pair)[1] = reinterpret_cast<u32(&)[1]>(rows[j][i]);
          load_words(pair, row + 4 * lane + 16 * i, there && (whole || 2 * lane + 8 * i < keys));
        }
      }
    }
  }
};

}  // namespace attention
