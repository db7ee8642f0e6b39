// attention: masks whose blocks are listed. Which blocks loops go over the lists say; what is seen of a block of which
// not all is seen, a score term says by bits.
#pragma once

#include "attention/blocks.cuh"
#include "attention/masks.cuh"
#include "attention/params.cuh"
#include "attention/term.cuh"
#include "core/math.cuh"
#include "core/types.cuh"

namespace attention {

// A list is that of a sequence and key head; one may serve all sequences, or all heads.
struct BlockMaskData {
  const i32* mask_key_entries;    // for each block of queries, its blocks of keys: 2 · block, + 1 if all of it is seen
  const i32* mask_key_offsets;    // (lists, query_blocks + 1): where they begin
  const i32* mask_query_entries;  // for each block of keys, its blocks of queries
  const i32* mask_query_offsets;  // (lists, key_blocks + 1)
  const i32* mask_tiles;          // (lists, query_blocks, key_blocks): which of the tiles says what is seen, or below 0
  const i32* mask_bits;           // (tiles, rows, columns / 32): a word has 32 keys, the first in its lowest bit
  const i32* mask_key_tiles;      // the tile of each of mask_key_entries, or below 0
  const i32* mask_query_tiles;    // and of each of mask_query_entries
  const i32* mask_query_order;    // (lists, query_blocks): blocks of queries, those with the most blocks of keys first
  const i32* mask_key_order;      // (lists, key_blocks)
  // For each block of keys the parts of 64 queries of its blocks of queries, without those of which no query sees any
  // of its keys, as the lists above are: entries, (lists, key_blocks + 1) offsets, and the tile of each entry.
  const i32* mask_part_entries;
  const i32* mask_part_offsets;
  const i32* mask_part_tiles;
  const i32* mask_bounds;  // (tiles, rows + columns): see `Bounds`; not used where some tile has no bounds
  i32 query_blocks, key_blocks;
  i32 batch_lists, head_lists;  // lists from one sequence to the next, and from one key head to the next
  i32 qheads_per_khead;
};

constexpr int list_of(const BlockMaskData& data, int batch, int key_head) {
  return batch * data.batch_lists + key_head * data.head_lists;
}

// Hides keys. `by_head` is whether key heads have lists of their own, and `has_bounds` whether what a query sees of a
// block are keys side by side, and what a key is seen by are queries side by side.
template <int block_rows, int block_columns, bool by_head, bool has_bounds>
struct BlockMask : Term {
  using Data = BlockMaskData;
  static constexpr bool per_head = by_head, bends = false, shapes = false, hides = true;
  static constexpr bool keeps_full = true, bounded = has_bounds;
  static constexpr int rows = block_rows, columns = block_columns, words = columns / 32;

  const i32* tiles;  // of the list
  const i32* bits;
  int key_blocks;
  int tile;  // that of the points that `keeps_within` is asked for

  BlockMask(const Data& data, int batch, int head)
      : tiles(data.mask_tiles + i64(list_of(data, batch, by_head ? head / data.qheads_per_khead : 0)) *
                                    (data.query_blocks * data.key_blocks)),
        bits(data.mask_bits),
        key_blocks(data.key_blocks),
        tile(all) {}

  bool keeps(const Point& at) const {
    BlockMask own = *this;
    own.enter(at.query, at.key);
    return own.keeps_within(at);
  }

  void enter(int query, int key) { tile = tiles[int(u32(query) / rows) * key_blocks + int(u32(key) / columns)]; }

  // Points that are not live are asked for as well: tiles divide blocks, so that bits have a place for every point of a
  // tile. Without branches a word is loaded once for all of its columns.
  bool keeps_within(const Point& at) const {
    const u32 query = at.query, key = at.key;
    const i32 word = bits[(i64(max_of(tile, 0)) * rows + query % rows) * words + key % columns / 32];
    return ((tile < 0 ? (tile == all ? -1 : 0) : word) >> key % 32 & 1) != 0;
  }

 private:
  static constexpr int all = -1;
};

// Lists that are made for sequences of their lengths.
template <int parts, bool has_bounds>
struct LiveBlockList : DividedBlockList<parts> {
  static constexpr bool bounded = has_bounds, all_live = true, sorted = true;
};

// A mask of ranges, of which a query sees those keys that lie in a listed block of its own. A listed block is
// `key_parts` blocks of keys of the loop's, or `query_parts` tiles of queries. With `by_parts` blocks of keys go over
// the lists of parts instead; then a block of keys may not need a tile that needs the block.
template <class Ranges, class Term, int key_parts, int query_parts, bool by_parts = false>
struct ListedMask : Ranges {
  using Blocks = LiveBlockList<key_parts, Term::bounded>;
  using Tiles = LiveBlockList<by_parts ? 1 : query_parts, Term::bounded>;

  template <class Config>
  static Blocks key_blocks(const Params& params, int batch, int key_head, int m_block) {
    static_assert(Term::columns == key_parts * Config::block_n, "blocks of keys divide those of the list");
    static_assert(Term::rows * Config::pack % Config::block_m == 0, "tiles of queries divide the blocks of the list");
    const BlockMaskData& data = Config::variant::template data_of<Term>(params.terms);
    // A tile past the end of its sequence is asked for, too.
    const int block = min_of(m_block / (Term::rows * Config::pack / Config::block_m), data.query_blocks - 1);
    const i32* const at = data.mask_key_offsets + i64(list_of(data, batch, key_head)) * (data.query_blocks + 1) + block;
    return {data.mask_key_entries + at[0], 0, (at[1] - at[0]) * key_parts, 0};
  }

  template <class Config>
  static Tiles query_tiles(const Params& params, int batch, int key_head, int n_block) {
    static_assert(Term::rows == query_parts * Config::block_m, "tiles of queries divide the blocks of the list");
    const BlockMaskData& data = Config::variant::template data_of<Term>(params.terms);
    const int block = min_of(n_block / key_parts, data.key_blocks - 1);
    static_assert(!by_parts || Config::block_m == 64, "a tile of queries is a part");
    const i32* const offsets = by_parts ? data.mask_part_offsets : data.mask_query_offsets;
    const i32* const at = offsets + i64(list_of(data, batch, key_head)) * (data.key_blocks + 1) + block;
    if constexpr (by_parts) return {data.mask_part_entries + at[0], 0, at[1] - at[0], 0};
    return {data.mask_query_entries + at[0], 0, (at[1] - at[0]) * query_parts, 0};
  }

  // The tile of the block of keys, or of the tile of queries, at a position; below 0 where bits say nothing.
  template <class Config>
  static int tile_of(const Params& params, const Blocks& blocks, int position) {
    const BlockMaskData& data = Config::variant::template data_of<Term>(params.terms);
    return data.mask_key_tiles[blocks.entries - data.mask_key_entries + u32(position) / key_parts];
  }
  template <class Config>
  static int tile_seeing(const Params& params, const Tiles& tiles, int position) {
    const BlockMaskData& data = Config::variant::template data_of<Term>(params.terms);
    if constexpr (by_parts) return data.mask_part_tiles[tiles.entries - data.mask_part_entries + u32(position)];
    return data.mask_query_tiles[tiles.entries - data.mask_query_entries + u32(position) / query_parts];
  }

  // The tiles of queries, and the blocks of keys, in the order in which they take less and less; as they lie where they
  // are parts of what is listed.
  template <class Config>
  static int longest_tile(const Params& params, int batch, int key_head, int place) {
    const BlockMaskData& data = Config::variant::template data_of<Term>(params.terms);
    if (Term::rows * Config::pack != Config::block_m) return place;
    return data.mask_query_order[list_of(data, batch, key_head) * data.query_blocks + place];
  }
  template <class Config>
  static int longest_block(const Params& params, int batch, int key_head, int place) {
    const BlockMaskData& data = Config::variant::template data_of<Term>(params.terms);
    return key_parts > 1 ? place : data.mask_key_order[list_of(data, batch, key_head) * data.key_blocks + place];
  }

  // What a query sees of the keys of a tile, and what queries of a tile see a key.
  template <class Config>
  static Bounds bounds_of_query(const Params& params, int tile, int query) {
    return bounds<Config>(params, tile, u32(query) % Term::rows);
  }
  template <class Config>
  static Bounds bounds_of_key(const Params& params, int tile, int key) {
    return bounds<Config>(params, tile, Term::rows + u32(key) % Term::columns);
  }

  // How far in its block a key, or a query, lies.
  static constexpr int within_columns(int key) { return u32(key) % Term::columns; }
  static constexpr int within_rows(int query) { return u32(query) % Term::rows; }

 private:
  template <class Config>
  static Bounds bounds(const Params& params, int tile, int place) {
    const BlockMaskData& data = Config::variant::template data_of<Term>(params.terms);
    return tile < 0 ? Bounds{} : Bounds{u32(data.mask_bounds[tile * (Term::rows + Term::columns) + place])};
  }
};

}  // namespace attention
