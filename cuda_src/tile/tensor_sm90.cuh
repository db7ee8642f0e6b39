// tile: boxes of a tensor, copied by the tensor memory accelerator into shared tiles panel by panel.
#pragma once

#include "core/types.cuh"
#include "ptx/tma.cuh"
#include "tile/shared.cuh"

namespace tile {

// A panel is one box {panel columns, rows} of the map, with the swizzle of the tile.
template <class Tile>
inline constexpr int panel_cols = Tile::panel_chunks * Tile::chunk_elements;

// tile ← rows of a map with the axes (columns, rows, heads, outer). The copies count Tile::bytes on `barrier`. A box of
// the map may have fewer rows than the tile.
template <int box_rows, class Tile>
inline void load_boxes(const Tile& tile, const ptx::TensorMap& map, u32 barrier, int row, int head, int outer) {
  static_assert(Tile::rows % box_rows == 0 && box_rows % 8 == 0, "boxes make up the tile");
#pragma unroll
  for (int panel = 0; panel < Tile::panels; ++panel) {
#pragma unroll
    for (int first = 0; first < Tile::rows; first += box_rows) {
      ptx::cp_async_bulk_tensor_4d(tile.base + panel * Tile::panel_stride + Tile::step_rows(first), map, barrier,
                                   panel * panel_cols<Tile>, row + first, head, outer);
    }
  }
}

template <class Tile>
inline void load(const Tile& tile, const ptx::TensorMap& map, u32 barrier, int row, int head, int outer) {
  load_boxes<Tile::rows>(tile, map, barrier, row, head, outer);
}

// tile ← rows of a map with the axes (columns, heads that share a tile, rows, key heads, outer): a row of each of the
// heads, then the next row of each, and so on.
template <class Tile>
inline void load_heads(const Tile& tile, const ptx::TensorMap& map, u32 barrier, int row, int head, int outer) {
#pragma unroll
  for (int panel = 0; panel < Tile::panels; ++panel) {
    ptx::cp_async_bulk_tensor_5d(tile.base + panel * Tile::panel_stride, map, barrier, panel * panel_cols<Tile>, 0, row,
                                 head, outer);
  }
}

}  // namespace tile
