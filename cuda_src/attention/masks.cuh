// attention: masks. A mask is a type: it says which keys a query sees, and so which queries see a key. Both are ranges.
//
// A mask whose Blocks are of another kind than BlockRange also says which blocks there are, and then a query sees those
// keys of its range that lie in a block of its tile:
//   template <class Config>
//   static Blocks key_blocks(const Params&, int batch, int key_head, int m_block);  // that a tile of queries needs
//   template <class Config>
//   static Tiles query_tiles(const Params&, int batch, int key_head, int n_block);  // that a block of keys needs
// A tile is of Config::block_m queries, and a block of Config::block_n keys. A tile needs a block if the block needs
// the tile. Where nothing in the blocks of a row's tile is to be seen by the row, its range is empty.
#pragma once

#include "attention/blocks.cuh"
#include "attention/params.cuh"
#include "attention/seqlen.cuh"
#include "core/math.cuh"

namespace attention {

// Every query sees every key.
struct FullMask {
  // The kind of the blocks of keys that a tile of queries needs, and that of the tiles of queries that a block of keys
  // needs.
  using Blocks = BlockRange;
  using Tiles = BlockRange;

  // Whether queries may not see the first keys of their sequence, and whether they may not see the last ones.
  static constexpr bool hides_first = false, hides_last = false;

  // The keys of a query row are [first_key, last_key]; there may be none.
  static constexpr int first_key(const Params&, const Seqlen&, int) { return 0; }
  static constexpr int last_key(const Params&, const Seqlen& seqlen, int) { return seqlen.k - 1; }
};

// Query i sees key j if j <= i + diagonal.
struct CausalMask {
  using Blocks = BlockRange;
  using Tiles = BlockRange;
  static constexpr bool hides_first = false, hides_last = true;

  static constexpr int first_key(const Params&, const Seqlen&, int) { return 0; }
  static constexpr int last_key(const Params&, const Seqlen& seqlen, int row) {
    return min_of(seqlen.k - 1, row + seqlen.diagonal());
  }

  // The first query that sees a key, by the query at the key's own position. A mask that hides last keys has it.
  static constexpr int first_query(const Params&, int own) { return own; }
};

// Query i sees the keys from window_left before its own position to window_right behind it.
struct WindowMask {
  using Blocks = BlockRange;
  using Tiles = BlockRange;
  static constexpr bool hides_first = true, hides_last = true;

  static constexpr int first_key(const Params& params, const Seqlen& seqlen, int row) {
    return max_of(0, row + seqlen.diagonal() - params.window_left);
  }
  static constexpr int last_key(const Params& params, const Seqlen& seqlen, int row) {
    return min_of(seqlen.k - 1, row + seqlen.diagonal() + params.window_right);
  }

  static constexpr int first_query(const Params& params, int own) { return own - params.window_right; }

  // The last query that sees a key. A mask that hides first keys has it.
  static constexpr int last_query(const Params& params, int own) { return own + params.window_left; }
};

}  // namespace attention
