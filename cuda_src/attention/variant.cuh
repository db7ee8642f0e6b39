// attention: what happens to a score between q·k and the softmax. A variant is a list of terms, applied in the order of
// the specification. The main loops know no term by name.
#pragma once

#include "attention/params.cuh"
#include "attention/term.cuh"
#include "core/math.cuh"
#include "core/types.cuh"

namespace attention {

// Products of the derivatives of terms by their scores. A term with a gradient is told the gradient by what it made of
// a score, in which are the derivatives of the terms `after` it. Its own, and those of the terms `before` it, are
// multiplied to that once it has been told. Where no term has a gradient, all are `after`.
struct Derivatives {
  float before = 1.0f, after = 1.0f;
};

template <class... Terms>
struct Variant;

template <>
struct Variant<> {
  static constexpr bool empty = true, per_head = false, bends = false, scales = false, has_gradient = false;
  static constexpr bool hides = false, hides_in_full = false, holds = false, reads_score = false, wild = false;
  static constexpr bool sequences_share = false;
  static constexpr int loading = 0;
  static constexpr bool light = true;
  static constexpr bool drops = false, weighs = false, shapes = false, loads = false, gathers = false, pairs = false;
  static constexpr int words = 0;

  struct Loaded {};
  template <class Place, int m_tiles, int cols>
  struct Ahead {
    void load(const Variant&, const Place&) {}
    void arrange() {}
    Loaded of(int, int, int) const { return {}; }
  };
  template <int rows, int cols>
  struct Staged {
    static constexpr int bytes = 0, copied = 0;
    Staged(u32, int) {}
    Loaded of(int, int) const { return {}; }
  };
  template <int rows, int cols>
  struct Turned {
    void load(u32, int) {}
    Loaded of(int, int) const { return {}; }
  };

  Variant(const Params&, int, int) {}
  Variant(const u64*, int, int) {}

  float score(float s, const Point&) const { return s; }
  float score(float s, const Point&, Derivatives&) const { return s; }
  float score(float s, const Point&, const Loaded&, int) const { return s; }
  float score(float s, const Point&, const Loaded&, int, Derivatives&) const { return s; }
  float factor(const Point&) const { return 1.0f; }
  float weight(const Point&) const { return 1.0f; }
  static float gain(const u64*) { return 1.0f; }
  bool keeps(const Point&) const { return true; }
  bool keeps(const Point&, const Loaded&, int) const { return true; }
  void enter(int, int) {}
  bool keeps_within(const Point&) const { return true; }
  void gradient(float, const Point&) const {}
  void gradient(float, const Point&, float) const {}
  void flush() const {}
  template <bool along_keys>
  Loaded load(const Point&, const Point&) const {
    return {};
  }
  template <class Entries, class Place>
  void gather(const Entries&, const Place&) const {}
  template <int rows, int cols, class Map>
  void put(u32, const TilePoint&, const Map&, u32) const {}
  static void begin(const u64*, i64, i64) {}
  static void finish(const u64*, i64, i64) {}
};

template <class Term, class... Rest>
struct Variant<Term, Rest...> {
  using Data = typename Term::Data;
  using Others = Variant<Rest...>;
  static constexpr bool empty = false, per_head = Term::per_head || Others::per_head;
  static constexpr bool bends = Term::bends || Others::bends, scales = Term::scales || Others::scales;
  static constexpr bool has_gradient = Term::has_gradient || Others::has_gradient;
  static constexpr bool hides = Term::hides || Others::hides, shapes = Term::shapes || Others::shapes;
  static constexpr bool reads_score = Term::reads_score || Others::reads_score, wild = Term::wild || Others::wild;
  static constexpr bool sequences_share = Term::sequences_share || Others::sequences_share;
  static constexpr bool drops = Term::drops || Others::drops;
  static_assert(!(Term::drops && Others::drops), "masks of several terms that drop would have to be combined");

  // Whether a term scales that does not drop.
  static constexpr bool weighs = (Term::scales && !Term::drops) || Others::weighs;
  static constexpr bool loads = Term::loads || Others::loads;
  static constexpr int loading = Term::loads + Others::loading;                  // how many terms do
  static constexpr bool light = (!Term::loads || Term::light) && Others::light;  // whether those are light
  static constexpr bool gathers = Term::gathers || Others::gathers;
  static_assert(!(Term::gives_slope && Term::loads), "a score with a slope is asked for without what was loaded");
  // Whether keys may be hidden in blocks that the mask says are seen whole.
  static constexpr bool hides_in_full = (Term::hides && !Term::keeps_full) || Others::hides_in_full;

  // Whether the first term takes scores two by two. Keys that are hidden are hidden before that, lest their NaN spread,
  // which only masks do.
  static constexpr bool pairs = Term::pairs && !hides_in_full;

  // Whether derivatives have to be held until terms have had their gradients: a term up to the last one with a gradient
  // bends.
  static constexpr bool holds = has_gradient && (Term::bends || Others::holds);
  static_assert(!Term::has_gradient || !Others::holds,
                "behind the first score term with a gradient, none may bend up to the last one with a gradient");

  // The data of one of the terms.
  template <class Wanted>
  static auto& data_of(const u64* data) {
    if constexpr (is_same<Wanted, Term>)
      return of(data);
    else
      return Others::template data_of<Wanted>(data + own_words);
  }

  // The data of a term begin with a word of Params::terms, behind those of the terms before it.
  static constexpr int own_words = ceil_div(int(sizeof(Data)), int(sizeof(u64)));
  static constexpr int words = own_words + Others::words;
  static_assert(words <= Params::max_term_words, "the data of all terms must fit Params::terms");

  Term term;
  Others others;

  // What the terms read for two scores side by side.
  struct Loaded {
    typename Term::Loaded own;
    typename Others::Loaded others;
  };

  // The same for all scores of a warp's tile: loaded, then arranged by all lanes together, then asked for.
  template <class Place, int m_tiles, int cols>
  struct Ahead {
    typename Term::template Ahead<Place, m_tiles, cols> own;
    typename Others::template Ahead<Place, m_tiles, cols> others;

    void load(const Variant& variant, const Place& place) {
      own.load(variant.term, place);
      others.load(variant.others, place);
    }

    void arrange() {
      own.arrange();
      others.arrange();
    }

    Loaded of(int t, int i, int j) const { return {own.of(t, i, j), others.of(t, i, j)}; }
  };

  // The same where it was brought to shared memory, of one term behind that of another.
  template <int rows, int cols>
  struct Staged {
    using Own = typename Term::template Staged<rows, cols>;
    static constexpr int bytes = Own::bytes + Others::template Staged<rows, cols>::bytes;
    static constexpr int copied = Own::copied + Others::template Staged<rows, cols>::copied;
    static_assert(Term::stages || !Term::loads, "what one term reads is staged only where all that terms read is");
    static_assert(Own::copied == 0 || Others::template Staged<rows, cols>::copied == 0, "there is one map");

    Own own;
    typename Others::template Staged<rows, cols> others;

    Staged(u32 from, int row) : own(from, row), others(from + Own::bytes, row) {}

    Loaded of(int i, int j) const { return {own.of(i, j), others.of(i, j)}; }
  };

  template <int rows, int cols>
  struct Turned {
    static_assert(Term::boxed || !Term::loads, "what one term reads is turned only where all that terms read is");

    typename Term::template Turned<rows, cols> own;
    typename Others::template Turned<rows, cols> others;

    void load(u32 from, int key) {
      own.load(from, key);
      others.load(from + Term::template Staged<rows, cols>::bytes, key);
    }

    Loaded of(int i, int j) const { return {own.of(i, j), others.of(i, j)}; }
  };

  template <int rows, int cols, class Map>
  void put(u32 to, const TilePoint& at, const Map& map, u32 barrier) const {
    term.template put<rows, cols>(to, at, map, barrier);
    others.template put<rows, cols>(to + Term::template Staged<rows, cols>::bytes, at, map, barrier);
  }

  Variant(const Params& params, int batch, int head) : Variant(params.terms, batch, head) {}
  Variant(const u64* data, int batch, int head) : term(of(data), batch, head), others(data + own_words, batch, head) {}

  template <bool along_keys>
  Loaded load(const Point& low, const Point& high) const {
    return {term.template load<along_keys>(low, high), others.template load<along_keys>(low, high)};
  }

  float score(float s, const Point& at) const { return others.score(term.score(s, at), at); }

  // The same; the derivatives are multiplied by those of the terms.
  float score(float s, const Point& at, Derivatives& derivatives) const {
    float& derivative = has_gradient ? derivatives.before : derivatives.after;
    float scored, slope;
    if constexpr (Term::gives_slope) {
      scored = term.score(s, at, slope);
    } else {
      scored = term.score(s, at);
      slope = term.dscore(scored, at);
    }
    derivative *= slope;
    return others.score(scored, at, derivatives);
  }

  // The same with what was loaded for this score, number e of two, and another.
  float score(float s, const Point& at, const Loaded& loaded, int e) const {
    float scored;
    if constexpr (Term::loads)
      scored = term.score(s, at, loaded.own, e);
    else
      scored = term.score(s, at);
    return others.score(scored, at, loaded.others, e);
  }

  float score(float s, const Point& at, const Loaded& loaded, int e, Derivatives& derivatives) const {
    float& derivative = has_gradient ? derivatives.before : derivatives.after;
    float scored, slope;
    if constexpr (Term::gives_slope) {
      scored = term.score(s, at, slope);
    } else if constexpr (Term::loads) {
      scored = term.score(s, at, loaded.own, e);
      slope = term.dscore(scored, at);
    } else {
      scored = term.score(s, at);
      slope = term.dscore(scored, at);
    }
    derivative *= slope;
    return others.score(scored, at, loaded.others, e, derivatives);
  }

  // The same in two steps: two scores side by side, which are still to be multiplied by `scale`, and then each of them.
  void begin_pair(float (&s)[2], float scale) const {
    if constexpr (pairs) {
      term.score(s, scale);
    } else {
      s[0] *= scale;
      s[1] *= scale;
    }
  }

  float finish_one(float s, const Point& at, const Loaded& loaded, int e) const {
    if constexpr (pairs)
      return others.score(s, at, loaded.others, e);
    else
      return score(s, at, loaded, e);
  }

  float finish_one(float s, const Point& at, const Loaded& loaded, int e, Derivatives& derivatives) const {
    if constexpr (pairs) {
      float& derivative = has_gradient ? derivatives.before : derivatives.after;
      derivative *= term.dscore(s, at);
      return others.score(s, at, loaded.others, e, derivatives);
    } else {
      return score(s, at, loaded, e, derivatives);
    }
  }

  float factor(const Point& at) const { return term.factor(at) * others.factor(at); }

  // The factor without that of the term that drops.
  float weight(const Point& at) const { return (Term::drops ? 1.0f : term.factor(at)) * others.weight(at); }

  // What all factors are multiplied by besides.
  static float gain(const u64* data) { return Term::gain(of(data)) * Others::gain(data + own_words); }

  // The term that drops.
  const auto& dropping() const {
    if constexpr (Term::drops)
      return term;
    else
      return others.dropping();
  }

  bool keeps(const Point& at) const { return (!Term::hides || term.keeps(at)) && others.keeps(at); }

  bool keeps(const Point& at, const Loaded& loaded, int e) const {
    bool kept = true;
    if constexpr (Term::hides && Term::loads)
      kept = term.keeps(at, loaded.own, e);
    else if constexpr (Term::hides)
      kept = term.keeps(at);
    return kept && others.keeps(at, loaded.others, e);
  }

  // The same of points of a tile, of which a query and a key are given first.
  void enter(int query, int key) {
    term.enter(query, key);
    others.enter(query, key);
  }
  bool keeps_within(const Point& at) const {
    if constexpr (Term::keeps_full)
      return term.keeps_within(at) && others.keeps_within(at);
    else
      return (!Term::hides || term.keeps(at)) && others.keeps_within(at);
  }

  void gradient(float dscored, const Point& at) const {
    term.gradient(dscored, at);
    others.gradient(dscored, at);
  }

  // The same where a term is told its score, which is made again of the first one's.
  void gradient(float dscored, const Point& at, float s) const {
    if constexpr (Term::reads_score)
      term.gradient(dscored, at, s);
    else
      term.gradient(dscored, at);
    if constexpr (Others::reads_score)
      others.gradient(dscored, at, term.score(s, at));
    else
      others.gradient(dscored, at);
  }

  void flush() const {
    term.flush();
    others.flush();
  }

  template <class Entries, class Place>
  void gather(const Entries& dscored, const Place& place) const {
    term.gather(dscored, place);
    others.gather(dscored, place);
  }

  // Sets to 0 what gradients of terms add to, as thread `thread` of `threads`.
  static void begin(const u64* data, i64 thread, i64 threads) {
    Term::begin(of(data), thread, threads);
    Others::begin(data + own_words, thread, threads);
  }

  // Makes gradients of terms of what was added.
  static void finish(const u64* data, i64 thread, i64 threads) {
    Term::finish(of(data), thread, threads);
    Others::finish(data + own_words, thread, threads);
  }

 private:
  static const Data& of(const u64* data) { return *reinterpret_cast<const Data*>(data); }
};

}  // namespace attention
