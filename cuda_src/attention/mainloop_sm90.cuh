// attention: the forward main loop with wgmma, for sm_90. One thread keeps tensor copies in flight; warpgroups of
// consumers own 64 rows of the tile each.
//
// FlashAttention-3 (Shah et al., 2024), Algorithms 1 and 2, with three changes. Tiles follow each other without a seam:
// the consumers' loop runs over the key blocks of all tiles, the scores of one block are begun together with the
// products P·V of the block before, even where that one ended a tile, and a finished output is written while the next
// scores are computed. The softmax does not look for maxima: see Softmax::accept. Nor does it wait for P·V before the
// first Config::early_steps steps of the next P, for which registers are left.
#pragma once

#include "attention/block_ahead.cuh"
#include "attention/block_range.cuh"
#include "attention/chains.cuh"
#include "attention/epilogue_direct.cuh"
#include "attention/epilogue_empty.cuh"
#include "attention/forward_loader_sm90.cuh"
#include "attention/given_tiles_sm90.cuh"
#include "attention/own_blocks.cuh"
#include "attention/params.cuh"
#include "attention/repair.cuh"
#include "attention/row_source.cuh"
#include "attention/scoring.cuh"
#include "attention/softmax.cuh"
#include "attention/staged_terms.cuh"
#include "attention/work.cuh"
#include "core/math.cuh"
#include "ptx/opaque.cuh"
#include "ptx/shared.cuh"
#include "tile/accumulator.cuh"
#include "tile/gemm_sm90.cuh"
#include "tile/local.cuh"
#include "tile/pipeline.cuh"
#include "tile/shared.cuh"
#include "tile/tensor_sm90.cuh"
#include "tile/turn.cuh"

namespace attention {

template <class Config, class Source = GivenTiles<Config>>
struct MainloopSm90 {
  static_assert(Config::pack == 1 || !(Config::variant::per_head || Config::sinks),
                "a tile that heads share knows only their key head, so no score term or sink may differ by query head");

  using Configuration = Config;
  using TileSource = Source;
  using Loader = ForwardLoader<MainloopSm90>;
  using Argument = typename Source::Argument;
  using Work = typename Source::Work;
  using element = typename Config::element;
  using Q = tile::SharedTile<element, 64, Config::tile_head_dim>;  // one for each warpgroup
  using K = tile::SharedTile<element, Config::block_n, Config::tile_head_dim>;
  using V = tile::SharedTile<element, Config::block_n, Config::tile_head_dim_v>;

  static constexpr int consumers = Config::block_m / 64;
  using Queries = tile::Ring<Config::q_stages>;
  using Keys = tile::Ring<Config::stages>;

  using Scores = tile::Accumulator<1, Config::block_n>;
  using Probabilities = tile::Operand<Config::block_n>;
  using Out = tile::Accumulator<1, round_up(Config::head_dim_v, 16)>;
  using Statistics = Softmax<element, 1>;
  // Warpgroups take turns in giving the tensor cores work, so that the softmax of one runs during the products of the
  // others. A turn ends when its products have begun, or, with Config::whole_turns, when they are done. Where they have
  // blocks of their own, the last rows' keys are loaded first, and so theirs is the first turn.
  using Turn = tile::Turn<consumers, Config::own_blocks ? consumers - 1 : 0>;
  static_assert(!Config::own_blocks || Config::block_m - 64 <= (Config::stages - 1) * Config::block_n,
                "blocks that a warpgroup leaves out at the end fit beside its last, so that none of them waits for it");
  static constexpr int chain_blocks = tile::chain_blocks(Config::block_n);

  // The tiles on their way through the block: one warp finds a tile, then it is loaded, then computed, and its entry is
  // given back when its output is written.
  using Tiles = tile::Ring<4>;
  // Where tiles are found late, who loads says when one's last keys come next; it gets no other before that is heard.
  using Ends = tile::Ring<1>;

  // What is known of a tile. A tile with so many blocks of keys that sums over them would drift (tile/local.cuh) has an
  // entry for each chain of blocks.
  struct Entry : OwnBlocks<Config, Work, consumers> {
    bool end;  // whether no tile is left, and `work` means nothing
    int ends;  // which ends of the tile the chain has, if there are chains

    // Turns the entry of the whole tile, as it was found, into that of its chain `index`.
    void take_chain(int index) { attention::take_chain(this->work.blocks, ends, index, chain_blocks); }
  };

  struct Shared {
    typename Q::Storage q[Config::q_stages * consumers];
    typename K::Storage k[Config::stages];
    typename V::Storage v[Config::stages];
    typename Keys::Storage keys, values;
    typename Tiles::Storage tiles;
    typename Queries::Storage queries[consumers];
    Entry entries[Tiles::stages];
    u32 to_repair;  // whether some output is to be repaired; a warp that looks may miss what others have still to do
    typename Choose<Source::finds_late, typename Ends::Storage, u32>::type ends;
  };

  using Staged = StagedTerms<Config>;  // behind that
  static constexpr int staged_offset = round_up(int(sizeof(Shared)), 16);
  static constexpr int smem_bytes = Config::stages_terms ? Staged::end(staged_offset) : int(sizeof(Shared));

  u32 smem;
  Entry* entries;

  explicit MainloopSm90(char* dynamic_smem)
      : smem(ptx::shared_address(dynamic_smem)), entries(reinterpret_cast<Shared*>(dynamic_smem)->entries) {}

  Q q(int warpgroup, u32 stage) const {
    return {smem + tile::offset<&Shared::q> + (int(stage) * consumers + warpgroup) * Q::bytes};
  }
  K k(u32 stage) const { return {smem + tile::offset<&Shared::k> + stage * K::bytes}; }
  V v(u32 stage) const { return {smem + tile::offset<&Shared::v> + stage * V::bytes}; }
  Keys keys() const { return {smem + tile::offset<&Shared::keys>}; }
  Keys values() const { return {smem + tile::offset<&Shared::values>}; }
  Tiles tiles() const { return {smem + tile::offset<&Shared::tiles>}; }
  Queries queries(int warpgroup) const { return {smem + tile::offset<&Shared::queries> + warpgroup * Queries::bytes}; }
  Staged staged() const { return {smem + staged_offset}; }
  Ends ends() const { return {smem + tile::offset<&Shared::ends>}; }
  u32 to_repair() const { return smem + tile::offset<&Shared::to_repair>; }

  void init() const {
    keys().init(consumers);
    values().init(consumers);
    tiles().init(4 * consumers);
    for (int w = 0; w < consumers; ++w) queries(w).init(1);
    if constexpr (Source::finds_late) ends().init(1);
    staged().init(4 * consumers);
    ptx::st_shared_u32(to_repair(), 0);
    ptx::fence_mbarrier_init();
  }

  // Called by one warp, which finds the block's tiles ahead of the warps that load and compute them. It writes packed
  // tiles that see no key itself.
  void find_tiles(const Argument& argument, PackedScan& scan) const {
    typename Tiles::Cursor at_tiles;
    int chain = 0;
    Ends::Cursor at_ends;
    for (typename Source::Cursor at(argument);;) {
      Entry& entry = entries[at_tiles.stage()];
      tiles().wait_empty(at_tiles);
      __syncwarp();
      if (tile::lane() == 0) entry.end = at.done();
      if (!at.done()) entry.work.find(params_of(argument), scan, at.unit(), at.second());
      __syncwarp();
      if (at.done()) break;
      const bool idle = entry.work.idle(), empty = entry.work.blocks.empty();
      if (Source::finds_empty && !idle && empty) {
        epilogue_empty<Config, 32>(params_of(argument), entry.work, entry.work.sink(params_of(argument)), tile::lane());
      }
      if (!idle && !empty) {
        if constexpr (Config::chains) {
          __syncwarp();  // all lanes have read what the whole tile is
          if (tile::lane() == 0) entry.take_chain(chain);
          __syncwarp();
          chain = entry.ends & last_end ? 0 : chain + 1;
        }
        if (tile::lane() == 0) {
          entry.find_parts(params_of(argument));
          tiles().fill(at_tiles);
        }
        at_tiles.advance();
      }
      if (chain != 0) continue;
      if (Source::finds_late && !idle && !empty) {
        ends().wait_full(at_ends);
        at_ends.advance();
      }
      at.advance();
    }
    if (tile::lane() == 0) tiles().fill(at_tiles);
  }

  // Called by Source::load_lanes lanes of a warp, which load, in the order in which the consumers want them, K of every
  // block and, one block behind, V.
  void load_tiles(const Argument& argument) const {
    Loader loader{*this, argument};
    typename Tiles::Cursor at_tiles;
    const Work* v_work = nullptr;  // the tile whose V comes next
    int v_block = 0;               // the block of keys whose V comes next
    while (true) {
      tiles().wait_full(at_tiles);
      const Entry& entry = entries[at_tiles.stage()];
      if (entry.end) break;
#pragma unroll 1
      for (int position = entry.work.blocks.end - 1; position >= entry.work.blocks.begin; --position) {
        const int n_block = entry.work.blocks.block(position);
        const bool last = position == entry.work.blocks.begin && (!Config::chains || entry.ends & last_end);
        if (Source::finds_late && last && Loader::speaks()) ends().fill({});
        loader.load_keys(entry.work, n_block);
        if (v_work) loader.load_values(*v_work, v_block);
        if (position == entry.work.blocks.end - 1) loader.load_queries(entry.work);  // after K, since Q waits longest
        v_work = &entry.work;
        v_block = n_block;
      }
      at_tiles.advance();
    }
    if (v_work) loader.load_values(*v_work, v_block);
  }

  // Called by warpgroup `warpgroup` of the consumers, which computes its rows of all of the block's tiles.
  void consume(const Params& params, int warpgroup) const {
    constexpr int early_steps = Config::early_steps, steps = Config::block_n / 16;
    constexpr bool loads_ahead = Config::variant::loads && !Config::stages_terms;
    // Beside wide outputs there are no registers for what a list says while one is written.
    constexpr bool asks_late = Config::head_dim_v > 192 && !loads_ahead;
    const Queries queries = this->queries(warpgroup);
    const Turn turn(warpgroup);
    const float scale = exponent_scale<typename Config::variant>(params);
    typename Tiles::Cursor at_tiles;  // the tile whose scores are computed
    const auto at_queries = [&] { return typename Queries::Cursor{at_tiles.count}; };
    typename Keys::Cursor at_keys, at_values;
    // The entry of a tile before that, and what gives back blocks that only other warpgroups need.
    const auto entry = [&](int tiles_before) -> const Entry& { return entries[at_tiles.before(tiles_before).stage()]; };
    const auto skip = [&](const Keys& ring, typename Keys::Cursor& at, int blocks) {
      leave_out(ring, at, blocks, Turn::next_barrier + warpgroup);
    };

    tiles().wait_full(at_tiles);
    if (entries[at_tiles.stage()].end) return;
    const Work* work = &entries[at_tiles.stage()].work;
    auto blocks = entry(0).blocks_of(warpgroup);
    int position = blocks.end - 1;
    KeysAhead<Config> keys_ahead;
    typename Config::variant variant(params, work->tile.batch, work->tile.head);
    const auto place = [&] {
      const TileIndex& tile = work->tile;
      return Place<Config>{params,
                           work->seqlen,
                           tile.batch,
                           tile.head,
                           tile.m_block * Config::block_m + warp_row(),
                           keys_ahead.block(blocks, position) * Config::block_n};
    };
    const auto first_row = [&] { return work->tile.m_block * Config::block_m + warp_row() + tile::fragment_row(0, 0); };
    LoadedAhead<typename Config::variant, Place<Config>, 1, Scores::cols> ahead;
    const auto finish_scores = [&](Scores& scores) {
      const bool boundary = keys_ahead.is_boundary(blocks, position);
      if (Config::variant::pairs && unlikely(boundary)) keys_ahead.mask(variant, scores, place());
      if constexpr (Config::stages_terms) {
        staged().apply(variant, scores, place(), at_keys.previous(), warp_row());
      } else {
        apply(variant, scores, place(), ahead);
      }
      if (unlikely(boundary)) keys_ahead.mask(variant, scores, place());
    };
    Probabilities p;
    Out out;
    Statistics statistics, finished;  // the latter: of the tile in `out`, once that is finished
    Chains<Config::chains, element, 1, Out::cols> chains;
    {
      Scores scores;
      keys_ahead.ask(params, blocks, position);
      keys_ahead.ask_bounds(params, first_row());
      if constexpr (loads_ahead) ahead.load(variant, place());
      queries.wait_full(at_queries());
      skip(keys(), at_keys, entry(0).before(warpgroup));
      keys().wait_full(at_keys);
      warpgroup::gemm_abt<Config::head_dim>(scores, q(warpgroup, at_queries().stage()), k(at_keys.stage()));
      if constexpr (loads_ahead) ahead.arrange();
      warpgroup::wait<0>(scores);
      release(keys(), at_keys);
      if (threadIdx.x % 128 == 0 && position == blocks.begin) queries.release(at_queries());
      finish_scores(scores);
      statistics.init();
      bool far[2] = {true, true};
      statistics.follow_far(scores, scale, far);
      statistics.exponentiate(scores, scale);
      weigh(variant, scores, place());
      tile::pack<element>(p, scores);
      if (early_steps > 0 && position > blocks.begin) keys().wait_full(at_keys);
      skip(values(), at_values, entry(0).before(warpgroup));
    }
    // Each step begins the scores of a block and P·V of the block before, then turns the scores into the next P.
    out.zero();
    bool unwritten_out = false;  // whether `out` is finished but not written, and p, of the next tile, begins another
    while (true) {
      const bool seam = position == blocks.begin;  // p is of its tile's last block: scores of the next tile follow
      if (unlikely(seam)) {
        at_tiles.advance();
        tiles().wait_full(at_tiles);
        if (entries[at_tiles.stage()].end) break;
        work = &entries[at_tiles.stage()].work;
        blocks = entry(0).blocks_of(warpgroup);
        position = blocks.end;
        variant = typename Config::variant(params, work->tile.batch, work->tile.head);
        queries.wait_full(at_queries());
        skip(keys(), at_keys, entry(1).after(warpgroup) + entry(0).before(warpgroup));
        keys().wait_full(at_keys);
      } else if (early_steps == 0) {
        keys().wait_full(at_keys);
      }
      --position;
      if (!asks_late) keys_ahead.ask(params, blocks, position);
      Scores scores;
      if constexpr (loads_ahead) ahead.load(variant, place());
      turn.take();
      const int own = Config::head_dim > 160 ? ptx::opaque(warpgroup) : warpgroup;  // lest descriptors take registers
      warpgroup::gemm_abt<Config::head_dim>(scores, q(own, at_queries().stage()), k(at_keys.stage()));
      if (unlikely(unwritten_out)) {  // writing takes a while, and P·V has to wait for it
        turn.pass((warpgroup + 1) % consumers);
        write(out, finished, params, at_tiles.before(seam ? 2 : 1));
        skip(values(), at_values, entry(seam ? 1 : 0).before(warpgroup));
      }
      values().wait_full(at_values);
      warpgroup::gemm_ab(out, p, v(at_values.stage()), !unwritten_out);
      if (!Config::whole_turns && !unwritten_out) turn.pass((warpgroup + 1) % consumers);
      if (asks_late) keys_ahead.ask(params, work->blocks, position);
      keys_ahead.ask_bounds(params, first_row());
      if constexpr (loads_ahead) ahead.arrange();  // while the products run
      warpgroup::wait<1>(scores);
      release(keys(), at_keys);
      if (threadIdx.x % 128 == 0 && position == blocks.begin) queries.release(at_queries());
      finish_scores(scores);
      // The products still read p, so the next P begins in registers of its own.
      Probabilities early_p;
      float sum[2] = {statistics.row_sum[0][0], statistics.row_sum[0][1]};
      const auto at = place();
      const auto weight = weights(variant, at);
      if (!seam) statistics.template exponentiate_at_once<0, early_steps>(early_p, scores, scale, sum, weight);
      // Without a branch here the compiler would move the wait for the products up, above the exponentials, and believe
      // that p may be overwritten there.
      if (early_steps > 0 && position > blocks.begin) keys().wait_full(at_keys);
      warpgroup::wait<0>(out, p);
      if (Config::whole_turns && !unwritten_out) turn.pass((warpgroup + 1) % consumers);
      release(values(), at_values);
      bool far[2] = {true, true}, accepted = false;
      if (unlikely(seam)) {
        finished = chains.finished(out, statistics, scale, entries[at_tiles.previous().stage()].ends);
        statistics.init();
        skip(values(), at_values, entry(1).after(warpgroup));
      } else {
        tile::copy_steps<early_steps>(p, early_p);
        statistics.template exponentiate_at_once<early_steps, steps>(p, scores, scale, sum, weight);
        accepted = statistics.template accept<Config::block_n>(sum, far);
      }
      if (unlikely(!accepted)) {  // maxima are sought, as in the textbook
        statistics.follow_far(scores, scale, far);
        if (!seam) statistics.rescale(out);
        statistics.exponentiate(scores, scale);
        weigh(variant, scores, place());
        // Rows that are not far have these bits in p already. To ask which rows are far keeps the copies of the early
        // steps among the exponentials; else the compiler moves the copies to the path around this branch, behind
        // everything that could run beside them. Copies of one or two steps, where registers are few, may go there.
        tile::pack_rows<element, early_steps <= 2 ? 0 : early_steps>(p, scores, far);
      }
      unwritten_out = seam;
    }
    // Left to write are the output of the last tile but one, if the last has a single block, and that of the last.
#pragma unroll 1
    for (bool last = !unwritten_out;; last = true) {
      if (last) {
        if (unwritten_out) skip(values(), at_values, entry(1).before(warpgroup));
        values().wait_full(at_values);
        warpgroup::gemm_ab(out, p, v(at_values.stage()), !unwritten_out);
        warpgroup::wait<0>(out, p);
        finished = chains.finished(out, statistics, scale, entries[at_tiles.previous().stage()].ends);
      }
      write(out, finished, params, at_tiles.before(last ? 1 : 2));
      if (last) break;
    }
  }

  // Where the rows of this warp, one of the consumers', begin in the tile.
  static int warp_row() { return (int(threadIdx.x / 32) - 4) * 16; }

  // Writes a tile's output, if `out` has all of it, and gives back the tile's entry.
  void write(Out& out, const Statistics& statistics, const Params& params, typename Tiles::Cursor at) const {
    const Entry& entry = entries[at.stage()];
    if (!Config::chains || likely(entry.ends & last_end)) {
      const auto totals =
          statistics.template totals<Config::sinks>(entry.work.sink(params), Config::variant::gain(params.terms));
      totals.divide(out);
      if (unlikely(epilogue_direct<Config>(out, totals, params, entry.work, warp_row()))) {
        ptx::st_relaxed_shared_u32(to_repair(), 1);
      }
    }
    __syncwarp();
    if (tile::lane() == 0) tiles().release(at);
  }

  // Called by the consumers when no product runs any more: goes over the tiles again if some output is not finite.
  void repair_tiles(const Argument& argument, int warpgroup) const {
    __syncwarp();
    if (likely(ptx::ld_relaxed_shared_u32(to_repair()) == 0)) return;
    // A Place lies where the warp's rows of Q were, which nothing needs any more.
    struct Place {
      Work work;
      PackedScan scan;
    };
    static_assert(sizeof(Place) <= 16 * Q::panel_bytes, "a warp has 16 rows");
    constexpr int distance = tile::offset<&Shared::entries> - tile::offset<&Shared::q>;
    char* const queries = reinterpret_cast<char*>(entries) - distance + warpgroup * Q::bytes;
    Place& place = *reinterpret_cast<Place*>(queries + threadIdx.x / 32 % 4 * (16 * Q::panel_bytes));
    if (tile::lane() == 0) place.scan.init();
#pragma unroll 1
    for (typename Source::CursorAgain at(argument); !at.done(); at.advance()) {
      __syncwarp();
      place.work.find(params_of(argument), place.scan, at.unit(), at.second());
      __syncwarp();
      if (place.work.idle() || place.work.blocks.empty()) continue;
      repair<Config>(params_of(argument), place.work, place.work.tile.m_block * Config::block_m + warp_row(), 16);
    }
  }

  // Gives back a stage that wgmma has read, and moves on to the next. One thread speaks for its warpgroup.
  template <class Ring, class Cursor>
  static void release(const Ring& ring, Cursor& at) {
    if (threadIdx.x % 128 == 0) ring.release(at);
    at.advance();
  }
};

}  // namespace attention
