// attention: removes the entries of a transposed score tile, whose rows are keys and columns queries, that a query may
// not see.
#pragma once

#include "attention/masks.cuh"
#include "attention/params.cuh"
#include "attention/seqlen.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// The queries that see a key: [first, last], relative to first_query, so that comparisons are with constants.
template <class Config>
struct QuerySpan {
  using Mask = typename Config::mask;

  int first, last;

  QuerySpan(const Params& params, const Seqlen& seqlen, int key, int first_query) {
    const int diagonal_query = key - seqlen.diagonal() - first_query;
    first = last = 0;
    if constexpr (Mask::hides_last) first = Mask::first_query(params, diagonal_query);
    if constexpr (Mask::hides_first) last = Mask::last_query(params, diagonal_query);
    if (key >= seqlen.k) first = Config::block_m;
  }

  bool sees(int query) const { return query >= first && (!Mask::hides_first || query <= last); }
};

// The bits of an entry that is masked before a variant's terms are applied: not -infinity, of which terms may make
// something else, nor a NaN that a product can be.
inline constexpr u32 masked_entry = 0x7fc00001;

// first_key is the key of the warp's first row, first_query the query row of the tile's first column. Masked entries
// become `masked`.
template <class Config, int m_tiles, int block_m>
inline void mask_transposed(tile::Accumulator<m_tiles, block_m>& scores, const Params& params, const Seqlen& seqlen,
                            int first_key, int first_query, float masked = -infinity) {
#pragma unroll
  for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const QuerySpan<Config> span(params, seqlen, first_key + tile::fragment_row(t, i),
                                   first_query + tile::fragment_col());
#pragma unroll
      for (int j = 0; j < block_m / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!span.sees(8 * j + e)) scores.x[t][j][2 * i + e] = masked;
        }
      }
    }
  }
}

}  // namespace attention
