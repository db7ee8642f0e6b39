// attention: which of the blocks of keys that a tile needs each of its warpgroups goes over. A warpgroup has a part of
// the rows, and under a window these need neither the tile's first keys nor its last.
#pragma once

#include "attention/block_range.cuh"
#include "attention/params.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/barrier.cuh"

namespace attention {

// A tile's work and the blocks of each of `parts` of its rows: all blocks that those rows need and, since the parts
// take turns, as many as every other part has.
template <class Config, class Work, int parts, bool own = Config::own_blocks>
struct OwnBlocks {
  Work work;
  BlockRange part_blocks[parts];

  // One thread calls this when the work is known; the tile's blocks are not empty.
  void find_parts(const Params& params) {
    static_assert(Config::pack == 1 && !Config::chains, "rows are queries, and the tile is in one piece");
    constexpr int rows = Config::block_m / parts;
    const int last_row = work.seqlen.q - 1;
    int count = 1;
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      const int first = work.tile.m_block * Config::block_m + part * rows;
      BlockRange& range = part_blocks[part];
      find_block_range<Config>(params, work.seqlen, min_of(first, last_row), min_of(first + rows - 1, last_row), range);
      count = max_of(count, range.end - range.begin);
    }
#pragma unroll 1
    for (BlockRange& range : part_blocks) {
      range.end = max_of(range.end, work.blocks.begin + count);
      range.begin = range.end - count;
    }
  }

  const BlockRange& blocks_of(int part) const { return part_blocks[part]; }

  // How many blocks of the tile, which it goes over from last to first, come before those of a part, and after them.
  int before(int part) const { return work.blocks.end - part_blocks[part].end; }
  int after(int part) const { return part_blocks[part].begin - work.blocks.begin; }
};

// Every part goes over all blocks.
template <class Config, class Work, int parts>
struct OwnBlocks<Config, Work, parts, false> {
  Work work;

  void find_parts(const Params&) {}
  const auto& blocks_of(int) const { return work.blocks; }
  static constexpr int before(int) { return 0; }
  static constexpr int after(int) { return 0; }
};

// Gives back the stages of so many blocks, which only other warpgroups need. A warp that still waited for a stage that
// is given back would miss its phase, so the warpgroup meets at its barrier first.
template <class Ring>
inline void leave_out(const Ring& ring, typename Ring::Cursor& at, int blocks, u32 barrier) {
#pragma unroll 1
  for (; blocks > 0; --blocks) {
    ring.wait_full(at);
    ptx::bar_sync(barrier, 128);
    if (threadIdx.x % 128 == 0) ring.release(at);
    at.advance();
  }
}

}  // namespace attention
