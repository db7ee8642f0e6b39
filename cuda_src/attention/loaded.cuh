// attention: what score terms load for the pairs of entries of scores that a thread holds: ahead of the products that
// give these, or when it is asked for.
#pragma once

#include "attention/variant.cuh"

namespace attention {

// Loaded ahead, for entries whose place says which row and columns they are.
template <class Variant, class Place, int m_tiles, int cols>
struct LoadedAhead {
  typename Variant::template Ahead<Place, m_tiles, cols> tile;

  void load(const Variant& variant, const Place& place) {
    if constexpr (Variant::loads) tile.load(variant, place);
  }

  // Called by all lanes together, once what was loaded may be waited for.
  void arrange() {
    if constexpr (Variant::loads) tile.arrange();
  }

  template <class Row>
  typename Variant::Loaded of(const Variant&, const Row&, int t, int i, int j) const {
    return tile.of(t, i, j);
  }
};

// Brought to shared memory.
template <class Variant, int rows, int cols>
struct LoadedStaged {
  typename Variant::template Staged<rows, cols> tile;

  template <class Row>
  typename Variant::Loaded of(const Variant&, const Row&, int, int i, int j) const {
    return tile.of(i, j);
  }
};

// Brought there, and loaded ahead for transposed scores.
template <class Variant, int rows, int cols>
struct LoadedTurned {
  typename Variant::template Turned<rows, cols> tile;

  void arrange() {}

  template <class Row>
  typename Variant::Loaded of(const Variant&, const Row&, int, int i, int j) const {
    return tile.of(i, j);
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
