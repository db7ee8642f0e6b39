// attention: how the keys of many tiles of queries are divided over thread blocks ("stream-K": Osama et al., 2023).
//
// A tile of queries that has keys of its own to go over is an item. Its positions stand for its blocks of keys; of
// items whose lengths only the device knows there may be more positions than blocks. A schedule says which positions of
// which items a thread block has: its units, one item's each. `Items` says where a position, or an item, lies:
//   Item at(int position);  // the item of a position, counted over all items
//   Item item(int index);
// An item without positions is nobody's: whoever wants something written for its rows gives it one.
#pragma once

#include "core/math.cuh"
#include "core/types.cuh"

namespace attention {

// An item, and where its positions lie among those of all items.
struct Item {
  int index, first, blocks;
};

// Items that all have as many positions.
struct EqualItems {
  i32 blocks;

  constexpr Item at(int position) const { return item(u32(position) / u32(blocks)); }
  constexpr Item item(int index) const { return {index, index * blocks, blocks}; }
};

// Positions [begin, end) of an item. There is none where end is 0.
struct SplitUnit {
  Item item;
  int begin, end;

  constexpr bool exists() const { return end > 0; }

  template <class Work, class Argument>
  Work work(const Argument& argument) const {
    return Work(argument, item.index);
  }
};

// The thread blocks that share an item: `count` from `first` on.
struct Sharers {
  int first, count;
};

// A row of positions that is cut into parts, of which the first `remainder` have one more than `quotient`.
struct EvenCut {
  i32 quotient, remainder;

  constexpr int begin(int part) const { return part * quotient + min_of(part, remainder); }

  // The part of a position.
  constexpr int part_of(int position) const {
    const int longer = remainder * (quotient + 1);
    const bool in_longer = position < longer;  // one division for both, of numbers without a sign
    const u32 parts = u32(in_longer ? position : position - longer) / u32(quotient + in_longer);
    return in_longer ? parts : remainder + parts;
  }
};

// The positions of all items, one item behind the other, in equal parts, one for each thread block: a block may end one
// item and begin another. No block waits for work longer than for one block of keys.
template <class Items>
struct EvenSchedule {
  Items items;
  EvenCut cut;

  // Whether no thread block has units of several items.
  static constexpr bool one_item() { return false; }

  // The first unit of a thread block, and the one behind another.
  constexpr SplitUnit first(int block) const { return unit(cut.begin(block), cut.begin(block + 1)); }
  constexpr SplitUnit next(const SplitUnit& before, int block) const {
    return unit(before.item.first + before.end, cut.begin(block + 1));
  }

  constexpr Sharers sharers(const Item& item) const {
    const int first = cut.part_of(item.first);
    return {first, cut.part_of(item.first + item.blocks - 1) - first + 1};
  }

 private:
  constexpr SplitUnit unit(int position, int end) const {
    if (position >= end) return {{0, 0, 0}, 0, 0};
    const Item item = items.at(position);
    return {item, position - item.first, min_of(item.blocks, end - item.first)};
  }
};

}  // namespace attention
