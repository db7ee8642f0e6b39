// attention: which blocks a loop goes over: the blocks of keys that a tile of queries needs, or the tiles of queries
// that a block of keys needs.
//
// A loop goes over positions [begin, end). Which block a position is, and whether all of it is seen, it asks; so a mask
// may have a kind of blocks of its own, with the members of the two here. Blocks are in increasing order. Some of the
// positions are blocks as well: a chain, or a part for each of several thread blocks.
#pragma once

#include "core/math.cuh"
#include "core/types.cuh"

namespace attention {

// Blocks that follow each other. A position is the block itself.
struct BlockRange {
  static constexpr bool contiguous = true;  // whether every block between two of the blocks is one of them
  static constexpr bool bounded = false;    // whether of each block bounds say what every row and column sees
  static constexpr bool sorted = false;     // whether the mask says which tiles, or blocks of keys, take longest

  int begin, end;            // blocks [begin, end) hold everything that is seen
  int full_begin, full_end;  // in blocks [full_begin, full_end) all is seen, by all

  constexpr bool empty() const { return begin >= end; }

  // Functions that ask nothing of the range are static, which spares the compiler an address of it.
  static constexpr int block(int position) { return position; }

  // Returns the block before that of a position, and any number where there is none.
  static constexpr int block_before(int position) { return position - 1; }

  // Says whether not all of the block of a position is seen by all. Where full_begin is known to be 0, only the end is
  // asked.
  template <bool has_full_begin = true>
  constexpr bool is_boundary(int position) const {
    return (has_full_begin && position < full_begin) || position >= full_end;
  }

  // Returns the position of a block, or, if it is none of the blocks, the one that it would have.
  static constexpr int position_of(int block) { return block; }

  constexpr bool contains(int block) const { return block >= begin && block < end; }
};

// Columns of a row that are seen: [first, end), counted from the first of a listed block; all of them by default. Those
// of a column are rows.
struct Bounds {
  u32 packed = 0xffffu << 16;  // first, in the lower half, and end

  constexpr int first() const { return packed & 0xffffu; }
  constexpr int end() const { return packed >> 16; }
};

// Blocks that are listed in device memory. A block that is listed may be several of the loop's, `parts` side by side.
template <int parts>
struct DividedBlockList {
  static constexpr bool contiguous = false, bounded = false, sorted = false;
  static constexpr bool all_live = false;  // whether no block is listed that lies past the end of a sequence

  const i32* entries;  // of listed blocks, in their order: 2 · block, + 1 if all of the block is seen by all
  int begin, end;
  int full_end;        // blocks from this one on are not seen whole, whatever their entries say
  int full_begin = 0;  // nor are those before this one

  constexpr bool empty() const { return begin >= end; }

  constexpr int entry(int position) const { return entries[u32(position) / parts]; }

  constexpr int block(int position) const { return (entry(position) >> 1) * parts + int(u32(position) % parts); }

  constexpr int block_before(int position) const { return block(max_of(begin, position - 1)); }

  template <bool has_full_begin = true>
  constexpr bool is_boundary(int position) const {
    const int block = this->block(position);
    return entry(position) % 2 == 0 || (has_full_begin && block < full_begin) || block >= full_end;
  }

  constexpr int position_of(int block) const {
    int low = begin, high = end;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (this->block(middle) < block)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  constexpr bool contains(int block) const {
    const int position = position_of(block);
    return position < end && this->block(position) == block;
  }

  // Leaves out the blocks that are not in a range, and lets none be seen whole of which not all is there. Where it is
  // known that the range begins with the first block, or that only parts of the last one that is listed may lie behind
  // it, nothing is looked for there: to do that is a chain of loads.
  template <bool hides_first = true, bool hides_last = true>
  constexpr void clip(const BlockRange& range) {
    const int first = hides_first ? position_of(range.begin) : begin;
    if constexpr (hides_last)
      end = position_of(range.end);
    else if constexpr (parts > 1)
      while (end > first && block(end - 1) >= range.end) --end;
    begin = first;
    full_begin = range.full_begin;
    full_end = range.full_end;
  }
};

using BlockList = DividedBlockList<1>;

// Part `index` of `count` parts of blocks, whose numbers of positions differ by one at most.
template <class Blocks>
constexpr Blocks part(Blocks blocks, int index, int count) {
  const i64 positions = max_of(0, blocks.end - blocks.begin);
  const int begin = blocks.begin;
  blocks.begin = begin + int(positions * index / count);
  blocks.end = begin + int(positions * (index + 1) / count);
  return blocks;
}

}  // namespace attention
