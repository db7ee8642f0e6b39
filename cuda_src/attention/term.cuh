// attention: what score terms are made of. A term is a struct in a header of its own, which says only what differs from
// `Term`. Beside the struct is that of its data, which the host packs into Params::terms by the names of its members; a
// pointer has the name of an array, or of a result, of the call. The host's twin of a term is in cufa/_terms, and where
// the two disagree on a flag, what has the term does not compile.
#pragma once

#include "attention/params.cuh"

namespace attention {

// Where a score is. Terms take what they need; what no term asks for is never computed.
struct Point {
  int batch, head;  // which sequence, and which query head
  int query, key;   // of the sequence's own
  float distance;   // how far the key lies before the query's own position: query + diagonal - key
  bool live;        // whether there are such a query and key; else a term must not read there, and what it says is void
  int diagonal;
  // How many queries or keys on it is from the first place of the thread's row, if that is known when this compiles.
  // What is reckoned of the first place is reckoned once for a row.
  int query_step = 0, key_step = 0;

  // The distance as an integer.
  int steps() const { return query + diagonal - key; }
};

// Where a tile of scores is: its first query and key.
struct TilePoint {
  int query, key, diagonal;
};

// A term is a closure over its data for a sequence and a query head: Term(const Data&, int batch, int head).
struct Term {
  static constexpr bool shapes = true;         // whether it has `score`, or `keeps` and is not `keeps_full`
  static constexpr bool per_head = true;       // whether it differs from one query head to the next
  static constexpr bool bends = true;          // whether its derivative by the score may be another than 1
  static constexpr bool scales = false;        // whether it has a `factor`
  static constexpr bool drops = false;         // whether its `factor` is 0 or 1, and it has `keep` and its like
  static constexpr bool hides = false;         // whether it has `keeps`
  static constexpr bool keeps_full = false;    // whether it keeps all of the blocks that the mask says are seen whole
  static constexpr bool has_gradient = false;  // whether it has a `gradient`, and `begin`
  static constexpr bool gives_slope = false;   // whether it has `score` with a slope, and so needs no `dscore`
  static constexpr bool wild = false;          // whether its slope may be infinite or NaN at a key that is not seen
  static constexpr bool reads_score = false;   // whether `gradient` also takes the score that the term is applied to
  static constexpr bool loads = false;    // whether it has `load`, `Ahead`, and functions that take what these give
  static constexpr bool light = false;    // whether its gradient, if it has one, takes few registers
  static constexpr bool stages = false;   // whether it has `Staged` and `put`
  static constexpr bool boxed = false;    // whether `put` makes tensor copies, and it has `Turned`
  static constexpr bool gathers = false;  // whether it has `gather`
  static constexpr bool sequences_share = false;  // whether all sequences share large arrays that heads do not share
  static constexpr bool apart = false;     // whether a kernel of its own makes its gradient (backward_bias_sm90.cuh)
  static constexpr bool finishes = false;  // whether it has `finish`
  static constexpr bool pairs = false;     // whether it also has `score` of two at once: see Softcap

  // What becomes of a score, and the derivative of that as a function of what `score` returned.
  float score(float s, const Point&) const { return s; }
  float dscore(float, const Point&) const { return 1.0f; }

  // The same at once, where the derivative does not follow from what becomes of a score.
  float score(float s, const Point&, float& slope) const {
    slope = 1.0f;
    return s;
  }

  // Whether the query keeps the key. Else the key is removed, as by a mask, whatever terms make of its score.
  bool keeps(const Point&) const { return true; }

  // Of a term that is `keeps_full`: it is told of a point that is in the same block as all that `keeps_within` is then
  // asked for, which is what `keeps` would say.
  void enter(int, int) {}
  bool keeps_within(const Point&) const { return true; }

  // What it reads for two scores side by side, of two keys (`along_keys`) or of two queries; `e` then says which of the
  // two, 0 or 1, is meant. Where scores come one by one the functions without it are asked, so a term has both. Main
  // loops may have all that a warp's tile takes read long before there are scores, which hides how long that takes:
  // with `Ahead`, as ScoreTile is.
  struct Loaded {};
  template <class Place, int m_tiles, int cols>
  struct Ahead {
    template <class Term>
    void load(const Term&, const Place&) {}
    void arrange() {}
    Loaded of(int, int, int) const { return {}; }
  };
  template <bool along_keys>
  Loaded load(const Point&, const Point&) const {
    return {};
  }

  // What it reads for a tile of `rows` queries by `cols` keys may also be brought to shared memory, by a warp that does
  // nothing else, blocks ahead of who asks for it: all lanes call `put`, which may begin copies by the map of the array
  // of scores, of `copied` bytes, that count on a barrier. `Staged` finds what the pair (0, j, 2 i) is given of it, by
  // the warp's first row of the tile: when it is asked for, all pairs of one i before those of the next. `Turned` loads
  // it at once, for transposed scores, by the warp's first key.
  template <int rows, int cols>
  struct Staged {
    static constexpr int bytes = 0, copied = 0;  // multiples of 16, of 1024 where there are copies
    Staged(u32, int) {}
    Loaded of(int, int) const { return {}; }
  };
  template <int rows, int cols>
  struct Turned {
    void load(u32, int) {}
    Loaded of(int, int) const { return {}; }
  };
  template <int rows, int cols, class Map>
  void put(u32, const TilePoint&, const Map&, u32) const {}

  float score(float s, const Point&, const Loaded&, int) const { return s; }
  bool keeps(const Point&, const Loaded&, int) const { return true; }

  // What a probability is multiplied by once it is divided by the sum of its row, to which it counts as it was: this,
  // and what is the same for all entries. What drops gives masks of several entries at once: see Dropout.
  float factor(const Point&) const { return 1.0f; }
  template <class Data>
  static float gain(const Data&) {
    return 1.0f;
  }

  // Takes the gradient by what `score` returned, once for every point that a query sees.
  void gradient(float, const Point&) const {}
  void gradient(float, const Point&, float) const {}

  // Follows the last `gradient` of a tile. All lanes of a warp call it together.
  void flush() const {}

  // Takes all of those that a warp holds at once, so that it may add up among them first: an accumulator, which is 0
  // where a query does not see the key, and where it lies (`Place`, `TransposedPlace`). All lanes call this together.
  template <class Entries, class Place>
  void gather(const Entries&, const Place&) const {}

  // Sets to 0 what `gradient` adds to. Every thread of an earlier launch calls this, thread `thread` of `threads`.
  template <class Data>
  static void begin(const Data&, i64, i64) {}

  // Makes its gradients of what was added. Every thread of a later launch calls this, thread `thread` of `threads`.
  template <class Data>
  static void finish(const Data&, i64, i64) {}
};

// A term without its gradient, for calls that do not want that.
template <class Own>
struct Constant : Own {
  using Own::Own;
  static constexpr bool has_gradient = false, reads_score = false, gathers = false, finishes = false, light = true;

  void gradient(float, const Point&) const {}
  void gradient(float, const Point&, float) const {}
  void flush() const {}
  template <class Entries, class Place>
  void gather(const Entries&, const Place&) const {}
  template <class Data>
  static void begin(const Data&, i64, i64) {}
  template <class Data>
  static void finish(const Data&, i64, i64) {}
};

}  // namespace attention
