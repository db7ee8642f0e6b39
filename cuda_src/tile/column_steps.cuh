// tile: how the operands of a warp's products lie in shared tiles.
#pragma once

#include "tile/shared.cuh"

namespace warp {

// A lane's address in each of the 32-byte steps of `cols` columns of a tile from first_col on. Where the columns cover
// whole panels or stay within one, first_col goes into the first address, and the steps are known at compile time.
template <class Tile, int cols>
struct ColumnSteps {
  static constexpr int panel_cols = Tile::panel_chunks * Tile::chunk_elements;
  static constexpr bool ahead = cols % panel_cols == 0 || panel_cols % cols == 0;
  u32 from;
  int first;

  // `address` is the lane's in the first 32 bytes of a row.
  ColumnSteps(u32 address, int first_col)
      : from(ahead ? Tile::step_chunks(address, first_col * int(sizeof(typename Tile::element)) / 32) : address),
        first(ahead ? 0 : first_col * int(sizeof(typename Tile::element)) / 32) {}

  u32 at(int step) const { return Tile::step_chunks(from, first + step); }
};

// How the rows of a product's A operand lie in its shared tile.
enum class Rows { along_rows, along_columns };

}  // namespace warp
