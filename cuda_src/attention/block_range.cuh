// attention: the range of the blocks of keys that a tile of queries needs, and of those that need no mask.
#pragma once

#include "attention/params.cuh"
#include "attention/seqlen.cuh"
#include "core/math.cuh"

namespace attention {

// A query row sees the keys [first, last]. The causal or the window mask and the live length give them.
template <bool causal, bool window>
struct KeySpan {
  static constexpr int first(const Params& params, const Seqlen& seqlen, int row) {
    return window ? max_of(0, row + seqlen.diagonal() - params.window_left) : 0;
  }

  static constexpr int last(const Params& params, const Seqlen& seqlen, int row) {
    if constexpr (window) return min_of(seqlen.k - 1, row + seqlen.diagonal() + params.window_right);
    return causal ? min_of(seqlen.k - 1, row + seqlen.diagonal()) : seqlen.k - 1;
  }
};

struct BlockRange {
  int begin, end;            // blocks [begin, end) hold every key some row of the tile sees
  int full_begin, full_end;  // blocks [full_begin, full_end) are seen whole by every row

  constexpr bool empty() const { return begin >= end; }

  // Says whether some row of the tile does not see all of a block of [begin, end). Without a window all rows begin with
  // key 0, so only the end is asked.
  template <class Config>
  constexpr bool is_boundary(int n_block) const {
    return (Config::window && n_block < full_begin) || n_block >= full_end;
  }
};

// Sets the range of a tile of queries.
template <class Config>
constexpr void find_block_range(const Params& params, const Seqlen& seqlen, int m_block, BlockRange& range) {
  constexpr int block_n = Config::block_n;
  constexpr bool window = Config::window;
  using Span = KeySpan<Config::causal, window>;
  const int first_tile_row = m_block * Config::block_m;
  const int first_row = first_tile_row / Config::pack;
  const int last_row = min_of((first_tile_row + Config::block_m - 1) / Config::pack, seqlen.q - 1);
  range.begin = Span::first(params, seqlen, first_row) / block_n;
  const int end = Span::last(params, seqlen, last_row) + 1;
  range.end = end > 0 ? ceil_div(end, block_n) : 0;
  range.full_begin = window ? ceil_div(Span::first(params, seqlen, last_row), block_n) : 0;
  const int full_end = Span::last(params, seqlen, first_row) + 1;
  range.full_end = full_end > 0 ? full_end / block_n : 0;
}

template <class Config>
inline BlockRange block_range(const Params& params, const Seqlen& seqlen, int m_block) {
  BlockRange range;
  find_block_range<Config>(params, seqlen, m_block, range);
  return range;
}

}  // namespace attention
