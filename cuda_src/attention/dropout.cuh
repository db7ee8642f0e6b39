// attention: the score term that drops probabilities at random: Srivastava et al., "Dropout: A Simple Way to Prevent
// Neural Networks from Overfitting", 2014.
//
// Whether an entry is kept follows from its sequence, head, query and key alone, whatever tile it is in. A counter of
// Philox gives the numbers of eight entries, which are those that a thread holds of 16 queries by 16 keys in the
// registers of mma.sync and wgmma: queries g and g + 8, and keys 2 c, 2 c + 1, 2 c + 8 and 2 c + 9. In a tile whose
// rows are keys, two lanes that each hold half of the entries of two counters draw one each, and trade halves: KeyRow.
#pragma once

#include "attention/term.cuh"
#include "core/philox.cuh"
#include "core/types.cuh"
#include "ptx/set.cuh"

namespace attention {

struct DropoutData {
  u32 keys[14];  // of Philox, for each round
  u32 bound;     // in both halves: what numbers of 15 bits are compared with, at most 2^14
  u32 flip;      // all bits where numbers below the bound are dropped, none where they alone are kept
  float gain;    // 1 / the probability of being kept
};

// The same where an array holds the key of Philox.
struct SeededDropoutData {
  const void* seed;
  u32 bound, flip;
  float gain;
};

// Round keys of the host's. They are not copied: instructions read parameters where they are.
struct GivenKeys {
  using Data = DropoutData;
  static_assert(sizeof(Data::keys) == 2 * philox_rounds * sizeof(u32), "each round has two words");
  const u32* words;

  explicit GivenKeys(const Data& data) : words(data.keys) {}
  u32 operator[](int i) const { return words[i]; }
};

// Those of an integer in memory, which is as wide as it may be.
template <class Seed>
struct LoadedKeys : PhiloxKey {
  using Data = SeededDropoutData;

  explicit LoadedKeys(const Data& data) : LoadedKeys(i64(*static_cast<const Seed*>(data.seed))) {}
  explicit LoadedKeys(i64 seed) : PhiloxKey{u32(seed), u32(u64(seed) >> 32)} {}
};

template <class Keys>
struct DropoutBy : Term {
  using Data = typename Keys::Data;
  static constexpr bool shapes = false, bends = false, scales = true, drops = true;

  const Data* data;
  Keys keys;
  u32 batch, head;

  DropoutBy(const Data& data, int batch, int head) : data(&data), keys(data), batch(batch), head(head) {}

  static float gain(const Data& data) { return data.gain; }

  float factor(const Point& at) const {
    u32 masks[4];
    keep(masks, query_word(at.query), key_word(at.key));
    const u32 mask = at.key & 8 ? masks[2 + (at.query >> 3 & 1)] : masks[at.query >> 3 & 1];
    return (at.key & 1 ? mask >> 16 : mask & 0xffff) != 0 ? 1.0f : 0.0f;
  }

  // The words of a counter that say of which 16 queries and 16 keys it is, and of which of these. Of the next 16 they
  // are 8 and 4 more.
  static u32 query_word(int query) { return query >> 4 << 3 | query & 7; }
  static u32 key_word(int key) { return key >> 4 << 2 | key >> 1 & 3; }

  // masks[2 c + r] ← masks of whether query + 8 r keeps keys key + 8 c, in the low half, and key + 8 c + 1, where the
  // words are of `query` and of an even `key`, which lie in the first half of 16.
  void keep(u32 (&masks)[4], u32 query_word, u32 key_word) const {
    draw(masks, query_word, key_word);
#pragma unroll
    for (int i = 0; i < 4; ++i) masks[i] = kept(below(masks[i]));
  }

  // The same, but of whether numbers are below the bound, of which `kept` makes what is kept.
  void compare(u32 (&masks)[4], u32 query_word, u32 key_word) const {
    draw(masks, query_word, key_word);
#pragma unroll
    for (int i = 0; i < 4; ++i) masks[i] = below(masks[i]);
  }

  // Any bits of masks may be turned at once.
  u32 kept(u32 below) const { return below ^ data->flip; }

  // masks[c] ← those of a query, wherever it lies.
  void keep_row(u32 (&masks)[2], int query, int key) const {
    u32 both[4];
    keep(both, query_word(query), key_word(key));
    masks[0] = query & 8 ? both[1] : both[0];
    masks[1] = query & 8 ? both[3] : both[2];
  }

 private:
  // numbers ← those of all entries of a counter, as `keep` orders them. Rounds multiply words 0 and 2, so a difference
  // of queries or keys is multiplied in all of them. The products of the first two are of one of the two alone, and the
  // compiler makes them once for all squares of the same queries, or keys.
  void draw(u32 (&numbers)[4], u32 query_word, u32 key_word) const {
    numbers[0] = query_word;
    numbers[1] = head;
    numbers[2] = key_word;
    numbers[3] = batch;
    philox(numbers, keys);
  }

  u32 below(u32 numbers) const { return ptx::set_abs_lt_f16x2(numbers, data->bound); }
};

using Dropout = DropoutBy<GivenKeys>;
template <class Seed>
using SeededDropout = DropoutBy<LoadedKeys<Seed>>;

}  // namespace attention
