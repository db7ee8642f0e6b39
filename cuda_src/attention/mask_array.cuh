// attention: the score term that removes the keys for which an array of booleans holds false.
#pragma once

#include "attention/score_array.cuh"
#include "attention/score_tile.cuh"
#include "attention/term.cuh"
#include "core/types.cuh"

namespace attention {

struct MaskArrayData {
  const void* mask;
  ScoreArrayLayout layout;
};

// Key j is kept if mask[batch][head][query][j]; what lies beyond the array's ends is not.
template <int step, bool paired, bool wide, bool bounded, bool per_head_>
struct MaskArray : Term {
  using Data = MaskArrayData;
  using Array = ScoreArray<1, step, paired, wide, bounded>;
  using Loaded = typename Array::Bits;
  template <class Place, int m_tiles, int cols>
  using Ahead = ScoreTile<MaskArray, Place, m_tiles, cols>;
  static constexpr bool per_head = per_head_, bends = false, hides = true, loads = true;

  Array array;

  MaskArray(const Data& data, int batch, int head) : array(data.mask, data.layout, batch, head) {}

  template <bool along_keys>
  Loaded load(const Point& low, const Point& high) const {
    return array.template bits<along_keys>(low, high);
  }

  float score(float s, const Point&) const { return s; }
  float score(float s, const Point&, const Loaded&, int) const { return s; }
  bool keeps(const Point& at) const { return array.bits(at) != 0; }
  bool keeps(const Point&, const Loaded& loaded, int e) const { return loaded.of(e) != 0; }
};

}  // namespace attention
