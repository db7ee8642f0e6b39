// attention: what a thread block of the backward works on. A work is a block of keys of a key head and, of every query
// head that shares the key head, the tiles of queries that see any of the keys.
#pragma once

#include "attention/backward_packed.cuh"
#include "attention/backward_params.cuh"
#include "attention/block_range.cuh"
#include "attention/masks.cuh"
#include "attention/row_source.cuh"
#include "attention/scheduler.cuh"
#include "attention/seqlen.cuh"
#include "core/math.cuh"
#include "tile/local.cuh"

namespace attention {

// Sets the range of the tiles of queries, of Config::block_m rows, that see any key of a block.
template <class Config>
constexpr void find_query_range(const Params& params, const Seqlen& seqlen, int n_block, BlockRange& range) {
  using Mask = typename Config::mask;
  constexpr int block_m = Config::block_m;
  const int first_key = n_block * Config::block_n, last_key = min_of(first_key + Config::block_n, seqlen.k) - 1;
  // A key's own position is that of query j - diagonal.
  int first_row = 0, first_full_row = 0, last_row = seqlen.q - 1, last_full_row = seqlen.q - 1;
  if constexpr (Mask::hides_last) {
    first_row = max_of(0, Mask::first_query(params, first_key - seqlen.diagonal()));
    first_full_row = max_of(0, Mask::first_query(params, last_key - seqlen.diagonal()));
  }
  if constexpr (Mask::hides_first) {
    last_row = min_of(last_row, Mask::last_query(params, last_key - seqlen.diagonal()));
    last_full_row = min_of(last_full_row, Mask::last_query(params, first_key - seqlen.diagonal()));
  }
  range.begin = first_row / block_m;
  range.end = last_key < first_key || last_row < first_row ? 0 : last_row / block_m + 1;
  range.full_begin = ceil_div(first_full_row, block_m);
  range.full_end = last_full_row < 0 ? 0 : (last_full_row + 1) / block_m;
  // Keys past the end of the sequence are masked in every tile. Rows past the end need no mask: their row_lse is
  // infinite, which makes their P 0.
  if (first_key + Config::block_n > seqlen.k)
    range.full_end = 0;
  else if (last_full_row == seqlen.q - 1)
    range.full_end = range.end;
}

template <class Config>
inline BlockRange query_range(const Params& params, const Seqlen& seqlen, int n_block) {
  BlockRange range;
  find_query_range<Config>(params, seqlen, n_block, range);
  return range;
}

// Returns the tiles of queries that a block of keys of key head `head` of sequence `batch` needs; see `key_blocks` in
// attention/block_range.cuh.
template <class Config>
constexpr typename Config::mask::Tiles query_tiles(const Params& params, const Seqlen& seqlen, int batch, int head,
                                                   int n_block) {
  using Mask = typename Config::mask;
  if constexpr (is_same<typename Mask::Tiles, BlockRange>) {
    return query_range<Config>(params, seqlen, n_block);
  } else {
    auto tiles = Mask::template query_tiles<Config>(params, batch, head, n_block);
    BlockRange range{};
    find_query_range<Config>(params, seqlen, n_block, range);
    constexpr bool live = Mask::Tiles::all_live;
    tiles.template clip<Mask::hides_last, Mask::hides_first || !live>(range);
    return tiles;
  }
}

// Says whether the block of keys writes dq itself. It does where it has all live keys of the sequence, and so computes
// the whole dq of the tiles that see them. Of dense arrays Config::writes_dq alone says that.
template <class Config>
inline bool writes_dq(const Seqlen& seqlen) {
  return Config::writes_dq && (!Config::varlen || seqlen.k <= Config::block_n);
}

constexpr PackedSequence packed_sequence(const BackwardParams& params, int b) {
  return {b, params.offsets_q[b].row, params.offsets_q[b + 1].row, params.offsets_k[b].row,
          params.offsets_k[b + 1].row};
}

// In the workspace the rows of a packed sequence begin with a multiple of this many, whose numbers make 16 bytes, which
// is what a copy takes.
inline constexpr int aligned_rows = 4;

// How many numbers the workspace has before the first row: as many as the largest tile has rows. Rows of packed tiles
// past the end of their sequence have these numbers.
inline constexpr int padding_rows = 128;

// Where the rows of a sequence begin in a head of the workspace. The sequence, packed, begins with row `first_row` of q
// and has `rank` sequences with rows of q before it.
template <class Config>
constexpr int padded_row(int first_row, int rank) {
  return Config::varlen ? first_packed_unit<aligned_rows>(first_row, rank) * aligned_rows : 0;
}

// The row of the workspace at which query head `head` of the sequence of a work or tile begins.
template <class Config, class Where>
constexpr i64 workspace_row(const BackwardParams& params, const Where& at, int head) {
  const int outer = Config::varlen ? 0 : at.batch;
  return (i64(outer) * params.forward.num_heads_q + head) * params.workspace_rows +
         padded_row<Config>(at.seqlen.q_first_row, at.rank);
}

// The index, among all tiles of the sums of dq, of tile m_block of query head `head` of the sequence of a work or tile.
template <class Config, class Where>
constexpr int sum_tile(const BackwardParams& params, const Where& at, int head, int m_block) {
  if constexpr (Config::varlen) {
    return head * params.forward.m_blocks + first_packed_unit<Config::block_m>(at.seqlen.q_first_row, at.rank) +
           m_block;
  } else {
    return int(workspace_row<Config>(params, at, head) / Config::block_m) + m_block;
  }
}

// The index, among the key heads of all sequences, of the one that a query head reads.
constexpr int key_head(const Params& params, int batch, int query_head) {
  return (batch * params.num_heads_q + query_head) / params.qheads_per_khead;
}

// The blocks of keys of a head come from the one before `middle` down to the first, and then from `middle` on: from
// first to last where that is 0, from last to first where it is at least their number. Returns the block that comes in
// a place.
constexpr int ordered_block(int place, int blocks, int middle) {
  const int lower = min_of(blocks, middle);
  return place < lower ? lower - 1 - place : place;
}

// Whether a kernel may have late blocks.
template <class Config>
inline constexpr bool may_be_late =
    Config::deterministic && !Config::varlen && is_same<typename Config::mask, CausalMask>;

// Whether a block of keys adds to sums that only such blocks add to, and goes from the last tile of queries to the
// first. Under a causal mask those from the middle on do, where a head has many blocks: all of them need the last
// tiles, but a later one fewer. From last to first one adds to a tile just before the next comes there, and nobody
// waits for the first blocks, which come to the last tiles at their end.
constexpr bool is_late(const BackwardParams& backward, int n_block) {
  return backward.late_sums > 0 && n_block >= backward.middle;
}

// How many counts a key head has in BackwardParams::heads_done: one of all its blocks of keys or, where its first tiles
// of dq are finished while later ones are added to, one of each Config::part_blocks blocks that follow each other.
template <class Config>
constexpr int done_counts(const BackwardParams& backward) {
  if constexpr (Config::part_blocks == 0)
    return 1;
  else
    return ceil_div(backward.n_blocks, Config::part_blocks);
}

// Where it is counted that block n_block of a key head has added to dq all that it adds.
template <class Config>
constexpr i32* done_count(const BackwardParams& backward, int key_head, int n_block) {
  i32* const counts = backward.heads_done + key_head * done_counts<Config>(backward);
  if constexpr (Config::part_blocks == 0)
    return counts;
  else
    return counts + n_block / Config::part_blocks;
}

// How many blocks of keys add to a tile of dq before block `n_block` does, in the deterministic order. `blocks` are
// those that the tile needs. Blocks add in the order in which they are launched, so that no block waits for one that
// cannot run.
template <class Blocks>
constexpr int turn_in(const BackwardParams& backward, const Blocks& blocks, int n_block) {
  const int position = blocks.position_of(n_block);
  const int middle = blocks.position_of(backward.middle);
  if (n_block < backward.middle) return min_of(blocks.end, middle) - 1 - position;
  return position - (is_late(backward, n_block) ? max_of(blocks.begin, middle) : blocks.begin);
}

// A unit of the backward of dense arrays is a block of keys of a key head.
struct DenseUnit {
  int n_block, head, batch;
};

// Finds what a unit of dense arrays is. Heads of all sequences follow each other where these share a large array.
template <class Config>
constexpr DenseUnit dense_unit(const BackwardParams& backward, int unit) {
  const Params& params = backward.forward;
  const int heads = params.num_heads_q / params.qheads_per_khead;
  const UnitIndex index = unit_of(unit, backward.n_blocks, params.batch * heads, params.heads_per_section);
  constexpr bool shared = Config::variant::sequences_share;
  const int head = shared ? index.head / params.batch : index.head % heads,
            batch = shared ? index.head % params.batch : index.head / heads;
  int n_block = ordered_block(index.place, backward.n_blocks, backward.middle);
  if constexpr (Config::mask::Tiles::sorted) {  // where blocks add in turn, they keep their order
    if (!Config::deterministic && in_last_section(params, index.head, params.batch * heads)) {
      n_block = Config::mask::template longest_block<Config>(params, batch, head, index.place);
    }
  }
  return {n_block, head, batch};
}

template <class Config>
struct BackwardWork {
  int n_block, head, batch;  // `head` is a key head; n_block is negative where there is no more work
  Seqlen seqlen;
  int key_rows;                        // how many rows of k and v the sequence has, live or not
  typename Config::mask::Tiles tiles;  // of queries
  int rank;                            // how many packed sequences before this one have rows of q
  int query_head, query_head_end;      // the query heads of the work: [query_head, query_head_end)

  // Where there are so many tiles of queries that sums over them would drift (tile/local.cuh), a unit's work is done in
  // chains. A chain has all tiles of a few query heads, or some of the tiles of one query head.
  bool first_chain, last_chain;
  bool late;        // see is_late; set where may_be_late
  int unit, chain;  // the work is chain number `chain` of the unit

  // Turns the work of the whole unit into chain number `chain`. Nothing is divided: the caller has few registers.
  constexpr void take_chain() {
    constexpr int most = tile::chain_blocks(Config::block_m);
    int index = chain;
    const int count = tiles.end - tiles.begin, heads_end = query_head_end;
    if (count * (heads_end - query_head) <= 2 * most) return;
    int chain_heads = 1;
    while (2 * chain_heads * count <= most) chain_heads *= 2;
    int begin = tiles.begin;
    first_chain = index == 0;
    for (; index > 0; --index) {
      begin += most;
      if (begin < tiles.end) continue;
      begin = tiles.begin;
      query_head += chain_heads;
    }
    query_head_end = min_of(query_head + chain_heads, heads_end);
    last_chain = begin + most >= tiles.end && query_head_end == heads_end;
    tiles.begin = begin;
    tiles.end = min_of(tiles.end, begin + most);
  }

  // Gives the work all query heads that share the key head, in one chain.
  constexpr void take_all(const Params& params) {
    query_head = head * params.qheads_per_khead;
    query_head_end = query_head + params.qheads_per_khead;
    first_chain = last_chain = true;
  }

  // The position that comes when `position` would if tiles came from first to last.
  int in_order(int position) const {
    return may_be_late<Config> && late ? tiles.begin + tiles.end - 1 - position : position;
  }

  // Where the work's keys are, in k and in v, and where the queries of a head are, in q and in dout.
  MappedRows keys() const { return {seqlen.k, seqlen.k_first_row, head, batch}; }
  MappedRows queries(int head) const { return {seqlen.q, seqlen.q_first_row, head, batch}; }

  // Whether there is no more work.
  constexpr bool none() const { return n_block < 0; }

  // Says whether the block of keys lies past the end of the sequence.
  constexpr bool idle() const { return n_block * Config::block_n >= key_rows; }

  // Finds the work of a unit. A whole warp calls this.
  static BackwardWork find(const BackwardParams& backward, int unit) {
    const Params& params = backward.forward;
    if constexpr (Config::varlen) {
      return of_packed(backward, find_packed(backward, unit));
    } else {
      const DenseUnit found = dense_unit<Config>(backward, unit);
      BackwardWork work;
      work.n_block = found.n_block;
      work.head = found.head;
      work.batch = found.batch;
      work.rank = 0;
      work.key_rows = params.seqlen_k;
      work.seqlen = dense_seqlen(params);
      work.tiles = query_tiles<Config>(params, work.seqlen, work.batch, work.head, work.n_block);
      work.take_all(params);
      if constexpr (may_be_late<Config>) work.late = is_late(backward, work.n_block);
      return work;
    }
  }

  // The work of a unit of packed sequences is found in two steps: the whole warp takes this one, and then of_packed or
  // take_packed needs one thread. With may_share a section may have heads of several sequences.
  template <bool may_share = false>
  static PackedUnit find_packed(const BackwardParams& backward, int unit) {
    const Params& params = backward.forward;
    const int heads = params.num_heads_q / params.qheads_per_khead;
    PackedUnit found;
    if (may_share && params.heads_per_section > heads) {
      const int sequences = params.heads_per_section / heads;
      found = packed_unit_beside<Config::block_n>(unit, backward.offsets_k, params.batch, heads, sequences);
    } else {
      found = packed_unit<Config::block_n>(unit, backward.offsets_k, params.batch, heads, params.heads_per_section);
    }
    found.place = ordered_block(found.place, found.units, backward.middle);
    return found;
  }

  static BackwardWork of_packed(const BackwardParams& backward, const PackedUnit& found) {
    BackwardWork work{};
    if (found.units > 0) work.take_packed(backward, found);
    return work;
  }

  void take_packed(const BackwardParams& backward, const PackedUnit& found) {
    BackwardWork& work = *this;
    const PackedSequence sequence = packed_sequence(backward, found.batch);
    work.n_block = found.place;
    work.head = found.head;
    work.batch = found.batch;
    work.seqlen = packed_seqlen(backward.forward, sequence);
    work.key_rows = sequence.k_end - sequence.k_begin;
    work.tiles = query_tiles<Config>(backward.forward, work.seqlen, found.batch, found.head, found.place);
    work.rank = backward.offsets_q[found.batch].rank;
    work.take_all(backward.forward);
  }

  // Puts the work of a unit where the first lane of a warp writes it: the caller has few registers. A whole warp calls
  // this.
  static void find_into(BackwardWork& work, const BackwardParams& backward, int unit) {
    if constexpr (Config::varlen) {
      const PackedUnit found = find_packed(backward, unit);
      if (tile::lane() != 0) return;
      if (found.units > 0)
        work.take_packed(backward, found);
      else
        work.n_block = work.key_rows = 0;  // idle
    } else {
      if (tile::lane() == 0) work = find(backward, unit);
    }
  }

  // How many units the launch has; some may be idle.
  static constexpr int units(const BackwardParams& backward) {
    const Params& params = backward.forward;
    return backward.n_blocks * (params.num_heads_q / params.qheads_per_khead) * (Config::varlen ? 1 : params.batch);
  }
};

// How many blocks of keys add to tile m_block of dq before that of the work does.
template <class Config>
inline int turn_of(const BackwardParams& backward, const BackwardWork<Config>& work, int m_block) {
  const int n_block = work.n_block;
  return turn_in(backward, key_blocks<Config>(backward.forward, work.seqlen, work.batch, work.head, m_block), n_block);
}

// Calls step(query head, position among the work's tiles of queries) for every tile that sees the block's keys or, of a
// work in chains, for every tile of the chain. The work is in shared memory, where every turn of the loop reads the
// last head again, which saves a register.
template <bool chains, class Config, class Step>
inline void for_each_query_tile(const Params& params, const BackwardWork<Config>& work, Step&& step) {
  const volatile int& chain_end = work.query_head_end;
  const int first_head = chains ? work.query_head : work.head * params.qheads_per_khead;
  const int end = work.tiles.end;
#pragma unroll 1
  for (int head = first_head; head < (chains ? int(chain_end) : first_head + params.qheads_per_khead); ++head) {
#pragma unroll 1
    for (int position = work.tiles.begin; position < end; ++position) step(head, work.in_order(position));
  }
}

// The same with step(query head, position, whether it is the first step), of which, with parts_first, the first is
// compiled apart; without, all are said not to be.
template <bool chains, bool parts_first, class Config, class Step>
inline void for_each_query_step(const Params& params, const BackwardWork<Config>& work, Step&& step) {
  if constexpr (!parts_first) {
    for_each_query_tile<chains>(params, work, [&](int head, int position) { step(head, position, Bool<false>{}); });
  } else {
    if (work.tiles.empty()) return;
    const volatile int& chain_end = work.query_head_end;
    const int first_head = chains ? work.query_head : work.head * params.qheads_per_khead;
    const int end = work.tiles.end;
    int head = first_head, position = work.tiles.begin;
    step(head, work.in_order(position), Bool<true>{});
#pragma unroll 1
    for (;;) {
#pragma unroll 1
      while (++position < end) step(head, work.in_order(position), Bool<false>{});
      if (++head >= (chains ? int(chain_end) : first_head + params.qheads_per_khead)) break;
      position = work.tiles.begin - 1;
    }
  }
}

// Calls step(query head, position) for every tile that sees the block's keys, and end_chain(first, last) after every
// `chain` steps and after the last; without chains end_chain is called once, at the end.
template <bool chains, class Config, class Step, class EndChain>
constexpr void for_each_query_chain(const Params& params, const BackwardWork<Config>& work, int chain, Step&& step,
                                    EndChain&& end_chain) {
  if constexpr (!chains) {
    for_each_query_tile<false>(params, work, step);
    end_chain(true, true);
    return;
  }
  const int begin = work.tiles.begin, end = work.tiles.end, last_head = params.qheads_per_khead - 1;
  if (begin >= end) return;
  int head = 0, position = begin;
#pragma unroll 1
  for (bool first = true, last = false; !last; first = false) {
#pragma unroll 1
    for (int left = chain; left > 0 && !last; --left) {
      step(work.head * params.qheads_per_khead + head, position);
      const bool next_head = ++position == end;
      last = next_head && head == last_head;
      head += next_head;
      if (next_head) position = begin;
    }
    end_chain(first, last);
  }
}

}  // namespace attention
