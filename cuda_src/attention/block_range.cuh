// attention: ranges of blocks, and the blocks of keys that a tile of queries needs.
#pragma once

#include "attention/masks.cuh"
#include "attention/params.cuh"
#include "attention/seqlen.cuh"
#include "core/math.cuh"

namespace attention {

// The blocks of keys that a tile of queries needs, or the tiles of queries that a block of keys needs.
struct BlockRange {
  int begin, end;            // blocks [begin, end) hold everything that is seen
  int full_begin, full_end;  // in blocks [full_begin, full_end) all is seen, by all

  constexpr bool empty() const { return begin >= end; }

  // Says whether not all of a block of [begin, end) is seen by all. Where full_begin is known to be 0, only the end is
  // asked.
  template <bool has_full_begin = true>
  constexpr bool is_boundary(int block) const {
    return (has_full_begin && block < full_begin) || block >= full_end;
  }
};

// Sets the range of the blocks of keys, of Config::block_n, that some row of a tile of queries sees.
template <class Config>
constexpr void find_block_range(const Params& params, const Seqlen& seqlen, int m_block, BlockRange& range) {
  constexpr int block_n = Config::block_n;
  using Mask = typename Config::mask;
  const int first_tile_row = m_block * Config::block_m;
  const int first_row = first_tile_row / Config::pack;
  const int last_row = min_of((first_tile_row + Config::block_m - 1) / Config::pack, seqlen.q - 1);
  range.begin = Mask::first_key(params, seqlen, first_row) / block_n;
  const int end = Mask::last_key(params, seqlen, last_row) + 1;
  range.end = end > 0 ? ceil_div(end, block_n) : 0;
  range.full_begin = Mask::hides_first ? ceil_div(Mask::first_key(params, seqlen, last_row), block_n) : 0;
  const int full_end = Mask::last_key(params, seqlen, first_row) + 1;
  range.full_end = full_end > 0 ? full_end / block_n : 0;
}

template <class Config>
inline BlockRange block_range(const Params& params, const Seqlen& seqlen, int m_block) {
  BlockRange range;
  find_block_range<Config>(params, seqlen, m_block, range);
  return range;
}

}  // namespace attention
