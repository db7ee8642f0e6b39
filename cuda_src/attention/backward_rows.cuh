// attention: writes rows of gradients straight from the registers of an accumulator.
#pragma once

#include "attention/repair.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "tile/accumulator.cuh"
#include "tile/copy.cuh"

namespace attention {

// row ← factor · the thread's row i of m-tile t, or zeros if factor is 0, whatever the thread's row holds. The row's
// columns begin at first_col; those from valid_cols on are not written, and nothing is unless the row is `live`. Lanes
// of a quad trade columns first, so all of them must call this.
template <int store_bytes, int valid_cols, class element, int m_tiles, int cols>
inline void write_row(element* row, i64 col_stride, bool live, const tile::Accumulator<m_tiles, cols>& from, int t,
                      int i, float factor, NotFinite<f32>& not_finite, int first_col = 0) {
  constexpr int n_tiles = cols / 8;
#pragma unroll
  for (int j = 0; j < n_tiles; ++j) {
    not_finite.look(from.x[t][j][2 * i], from.x[t][j][2 * i + 1]);
  }
  const auto value = [&](int j, int e) { return factor == 0.0f ? 0.0f : factor * from.x[t][j][2 * i + e]; };
  if constexpr (is_same<element, f32>) {
    const bool odd = tile::lane() % 2;  // an odd lane writes a chunk of the second of two n-tiles
#pragma unroll
    for (int j = 0; j < n_tiles; j += 2) {
      const float kept_0 = odd ? value(j + 1, 0) : value(j, 0), kept_1 = odd ? value(j + 1, 1) : value(j, 1);
      const float got_0 = __shfl_xor_sync(0xffffffffu, odd ? value(j, 0) : value(j + 1, 0), 1);
      const float got_1 = __shfl_xor_sync(0xffffffffu, odd ? value(j, 1) : value(j + 1, 1), 1);
      if (live) {
        const int chunk = first_col / 4 + 2 * (j + odd) + tile::lane() % 4 / 2;
        tile::store_chunk<store_bytes, valid_cols>(
            row, col_stride, chunk,
            uint4{__float_as_uint(odd ? got_0 : kept_0), __float_as_uint(odd ? got_1 : kept_1),
                  __float_as_uint(odd ? kept_0 : got_0), __float_as_uint(odd ? kept_1 : got_1)});
      }
    }
  } else {
    const tile::RowWriter<uint2, store_bytes, valid_cols, element> to(row, col_stride, warp::traded_chunk());
#pragma unroll
    for (int j = 0; j < n_tiles; j += 2) {
      const auto packed = [&](int j) { return ptx::cvt_rn_x2<element>(value(j, 0), value(j, 1)); };
      const uint2 traded = warp::trade(packed(j), packed(j + 1));
      if (live) to.store(first_col / 4 + 2 * j, warp::traded_chunk(), traded);
    }
  }
}

}  // namespace attention
