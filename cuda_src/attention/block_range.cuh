// attention: the blocks of keys that a tile of queries needs.
#pragma once

#include "attention/blocks.cuh"
#include "attention/masks.cuh"
#include "attention/params.cuh"
#include "attention/seqlen.cuh"
#include "core/math.cuh"
#include "core/types.cuh"

namespace attention {

// Sets the range of the blocks of keys, of Config::block_n, that some query from first_row to last_row sees.
template <class Config>
constexpr void find_block_range(const Params& params, const Seqlen& seqlen, int first_row, int last_row,
                                BlockRange& range) {
  constexpr int block_n = Config::block_n;
  using Mask = typename Config::mask;
  range.begin = Mask::first_key(params, seqlen, first_row) / block_n;
  const int end = Mask::last_key(params, seqlen, last_row) + 1;
  range.end = end > 0 ? ceil_div(end, block_n) : 0;
  range.full_begin = Mask::hides_first ? ceil_div(Mask::first_key(params, seqlen, last_row), block_n) : 0;
  const int full_end = Mask::last_key(params, seqlen, first_row) + 1;
  range.full_end = full_end > 0 ? full_end / block_n : 0;
}

// The same of a tile of queries.
template <class Config>
constexpr void find_block_range(const Params& params, const Seqlen& seqlen, int m_block, BlockRange& range) {
  const int first_tile_row = m_block * Config::block_m;
  const int first_row = first_tile_row / Config::pack;
  const int last_row = min_of((first_tile_row + Config::block_m - 1) / Config::pack, seqlen.q - 1);
  find_block_range<Config>(params, seqlen, first_row, last_row, range);
}

// The same of a tile whose rows are those of all heads that share a key head, query by query.
template <class Config>
constexpr BlockRange item_blocks(const Params& params, const Seqlen& seqlen, int m_block) {
  const int first_tile_row = m_block * Config::block_m, ratio = params.qheads_per_khead;
  const int last_row = min_of((first_tile_row + Config::block_m - 1) / ratio, seqlen.q - 1);
  BlockRange blocks{};
  find_block_range<Config>(params, seqlen, first_tile_row / ratio, last_row, blocks);
  return blocks;
}

template <class Config>
inline BlockRange block_range(const Params& params, const Seqlen& seqlen, int m_block) {
  BlockRange range;
  find_block_range<Config>(params, seqlen, m_block, range);
  return range;
}

// Returns the blocks of keys that a tile of queries needs; the keys are those of key head `head` of sequence `batch`. A
// mask of ranges says row by row what is seen. Any other mask knows the blocks that whole sequences would need, and
// here those that are not live, or in no row's range, are left out.
template <class Config>
constexpr typename Config::mask::Blocks key_blocks(const Params& params, const Seqlen& seqlen, int batch, int head,
                                                   int m_block) {
  using Mask = typename Config::mask;
  if constexpr (is_same<typename Mask::Blocks, BlockRange>) {
    return block_range<Config>(params, seqlen, m_block);
  } else {
    auto blocks = Mask::template key_blocks<Config>(params, batch, head, m_block);
    BlockRange range{};  // of constant expressions, too
    find_block_range<Config>(params, seqlen, m_block, range);
    constexpr bool live = Mask::Blocks::all_live;
    blocks.template clip<Mask::hides_first, Mask::hides_last || !live>(range);
    return blocks;
  }
}

// Says whether a tile of queries needs the block of a key. Of blocks that follow each other this need not be asked
// where the key is in the range of one of the tile's rows.
template <class Config>
inline bool needs_block_of(const Params& params, const Seqlen& seqlen, int batch, int head, int m_block, int key) {
  return key_blocks<Config>(params, seqlen, batch, head, m_block).contains(key / Config::block_n);
}

}  // namespace attention
