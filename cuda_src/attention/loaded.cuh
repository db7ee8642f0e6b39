// attention: what score terms load for the pairs of entries of scores that a thread holds: ahead of the products that
// give these, or when it is asked for.
#pragma once

#include "attention/variant.cuh"

namespace attention {

// Loaded ahead, for entries whose place says which row and columns they are.
template <class Variant, int m_tiles, int cols>
struct LoadedAhead {
  typename Variant::Loaded x[m_tiles][2][cols / 8];

  template <class Place>
  void load(const Variant& variant, const Place& place) {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const typename Place::Row row = place.row(t, i);
#pragma unroll
        for (int j = 0; j < cols / 8; ++j) {
          x[t][i][j] = variant.template load<Place::Row::along_keys>(row.at(8 * j), row.at(8 * j + 1));
        }
      }
    }
  }

  template <class Row>
  const typename Variant::Loaded& of(const Variant&, const Row&, int t, int i, int j) const {
    return x[t][i][j];
  }
};

// Loaded pair by pair.
struct LoadedNow {
  template <class Variant, class Row>
  static typename Variant::Loaded of(const Variant& variant, const Row& row, int, int, int j) {
    if constexpr (Variant::loads)
      return variant.template load<Row::along_keys>(row.at(8 * j), row.at(8 * j + 1));
    else
      return {};
  }
};

}  // namespace attention
