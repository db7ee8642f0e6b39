// attention: adds tiles of dq to sums in memory to which other thread blocks add as well, with the bulk copies of
// sm_90.
#pragma once

#include "attention/backward_finish.cuh"
#include "attention/backward_params.cuh"
#include "attention/backward_prepare.cuh"
#include "attention/backward_work.cuh"
#include "core/types.cuh"
#include "ptx/barrier.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"

namespace attention {

// One thread's way through tiles of dq_sum, each of which comes from shared memory in `parts`.
template <class Config, int parts>
struct DqSum {
  static constexpr int part_elements = Config::block_m * Config::tile_head_dim / parts;
  static constexpr int part_bytes = part_elements * sizeof(float);

  const BackwardParams& backward;
  i32 index, found, wanted;  // which tile; its state, in `turns`, that was found, and the one it has to have
  i32 untold = -1;           // a tile before, of which others have not been told yet that it is there

  // Asks, ahead of `wait`, for the state of a tile.
  void begin(const BackwardWork<Config>& work, int head, int m_block) {
    index = sum_tile<Config>(backward, work, head, m_block);
    if constexpr (Config::deterministic) {
      if (may_be_late<Config> && work.late) index += backward.late_sums;
      wanted = turn_of(backward, work, m_block);
      found = ptx::ld_acquire_gpu(backward.turns + index);
    } else {
      wanted = stored;
      found = ptx::atom_acquire_gpu_cas(backward.turns + index, untouched, claimed);
    }
  }

  bool first() const { return (Config::deterministic ? wanted : found) == 0; }

  // Waits until it is this block's turn, or until the tile can be added to.
  void wait() {
    if (first()) return;
    if (found != wanted) found = ptx::ld_acquire_gpu(backward.turns + index);
    if (found != wanted) tell<0>();  // whoever waits owes nobody anything
    while (found != wanted) found = ptx::ld_acquire_gpu(backward.turns + index);
    ptx::fence_proxy_async_global();
  }

  // Stores the part of the tile that is at `sums`, or adds it to what is there.
  void add(u32 sums, int part) const {
    float* const to = backward.dq_sum + i64(index) * (parts * part_elements) + part * part_elements;
    if (first())
      ptx::cp_async_bulk_store(to, sums, part_bytes);
    else
      ptx::cp_reduce_async_bulk_add_f32(to, sums, part_bytes);
    ptx::cp_async_bulk_commit_group();
  }

  // Other blocks may wait for this tile. They are told later, while the next tile is laid down: to wait here for the
  // copies to arrive takes longer than this thread can spare.
  void end() {
    if (Config::deterministic || first()) untold = index;
  }

  // Tells others of the untold tile. The thread's `running` latest copies are not of that tile.
  template <int running>
  void tell() {
    if (untold < 0) return;
    ptx::cp_async_bulk_wait_group<running>();
    ptx::fence_proxy_async_global();
    if (Config::deterministic)
      ptx::red_release_gpu_add(backward.turns + untold, 1);
    else
      ptx::st_release_gpu(backward.turns + untold, stored);
    untold = -1;
  }

  // Waits until all that the block's unit of work adds is there, and counts the unit.
  void finish_work(const BackwardWork<Config>& work) {
    tell<0>();
    ptx::cp_async_bulk_wait_group<0>();
    ptx::fence_proxy_async_global();
    const int head = key_head(backward.forward, work.batch, work.head * backward.forward.qheads_per_khead);
    ptx::red_release_gpu_add(done_count<Config>(backward, head, work.n_block), 1);
  }
};

// A thread block finishes every gridDim.x-th group of so many tiles of dq.
inline constexpr int finished_together = 4;

// Whether a thread block finishes tiles while it has work. Late blocks' sums take registers, and so do narrow stores.
template <class Config>
inline constexpr bool finishes_early = Config::finishes && !may_be_late<Config> && Config::store_bytes >= 8;

// The tile that comes as number `number` of the thread block's, one of so many blocks.
inline int finished_unit(int number, int blocks) {
  return (number / finished_together * blocks + blockIdx.x) * finished_together + number % finished_together;
}

// The tile that is such a unit. Where parts of heads are counted, tiles come as blocks of keys do: heads of a section
// side by side, first tiles first.
template <class Config>
inline RowTile finished_tile(const BackwardParams& backward, int unit) {
  const Params& params = backward.forward;
  if constexpr (Config::part_blocks == 0) {
    return RowTile::find<Config>(backward, unit, params.m_blocks);
  } else {
    return RowTile::of_dense<Config>(backward, unit_of(unit, params.m_blocks, params.num_heads_q * params.batch,
                                                       params.heads_per_section * params.qheads_per_khead));
  }
}

// Whether nobody adds to a tile any more: all blocks of its key head are done, or all those that are counted with one
// that the tile sees.
template <class Config>
inline bool is_done(const BackwardParams& backward, const RowTile& tile) {
  const int head = key_head(backward.forward, tile.batch, tile.head);
  if constexpr (Config::part_blocks == 0) {
    return ptx::ld_acquire_gpu(done_count<Config>(backward, head, 0)) == backward.n_blocks;
  } else {
    const BlockRange blocks = block_range<Config>(backward.forward, tile.seqlen, tile.m_block);
#pragma unroll 1
    for (int n_block = blocks.begin / Config::part_blocks * Config::part_blocks; n_block < blocks.end;
         n_block += Config::part_blocks) {
      const int counted = min_of(Config::part_blocks, backward.n_blocks - n_block);
      if (ptx::ld_acquire_gpu(done_count<Config>(backward, head, n_block)) != counted) return false;
    }
    return true;
  }
}

// Writes dq of tiles that are done, by one warp, piece by piece, while the block is at work on others: the L2 may still
// hold their sums, and at the end, when nothing multiplies, less is left to do.
template <class Config, class Main>
struct EarlyFinish {
  using element = typename Config::element;
  static constexpr int pieces = Main::dq_threads / 32;  // of a tile: what a warp of those that else finish it has

  // In shared memory, since registers are few: how many of the block's tiles are finished, and what is to be known of
  // the next while it is.
  struct State {
    int blocks, done, piece, live_rows;
    element* rows;      // of dq
    const float* sums;  // of the tile
    float factor;
  };

  const BackwardParams& backward;
  State& state;

  static void init(State& state) {
    state.blocks = gridDim.x;  // read from here, it holds no register
    state.done = 0;
    state.piece = pieces;
  }

  // Whether heads are long enough. Few tiles of 64 rows are left to the end: the warp's accesses to memory took short
  // heads longer than they saved.
  static bool pays(const BackwardParams& backward) { return Config::block_m > 64 || backward.forward.m_blocks >= 16; }

  // Whether there is a piece to write. Where a tile is finished, asks whether the next is done.
  bool find() {
    if (!pays(backward)) return false;
    __syncwarp();
    if (state.piece < pieces) return true;
    __syncwarp();
    bool found = false;
    if (tile::lane() == 0) {
      const int unit = finished_unit(state.done, state.blocks);
      if (unit < RowTile::count<Config>(backward)) {
        const RowTile tile = finished_tile<Config>(backward, unit);
        state.rows = tile.rows(static_cast<element*>(backward.dq), backward.dq_strides, Config::block_m);
        state.sums = backward.dq_sum + tile.template sums<Config>(backward);
        state.live_rows = tile.seqlen.q - tile.m_block * Config::block_m;
        found = is_done<Config>(backward, tile);
        const bool added = __ldcg(backward.turns + tile.template sum_index<Config>(backward)) != 0;
        state.factor = added ? backward.forward.softmax_scale : 0.0f;
        if (found) state.piece = 0;
      }
    }
    __syncwarp();
    return __shfl_sync(0xffffffffu, int(found), 0);
  }

  // Writes what 32 of the threads that else finish tiles have of the tile: 16 rows. A lane has 8 columns of a
  // row, which are a pair of each thread of a quad.
  void write_piece() {
    constexpr int group = Main::dq_group, n_tiles = Main::Dq::n_tiles;
    static_assert(Main::dq_vector == 4 && Main::Dq::m_tiles == 1 && n_tiles % 2 == 0,
                  "a lane has columns of an n-tile");
    const int first = 32 * state.piece, lane = tile::lane();
    const int row = Main::dq_row(first) + lane / 4 + lane / 2 % 2 * 8;
    const float2* from = reinterpret_cast<const float2*>(state.sums) + first / group * (2 * group * n_tiles) +
                         2 * (first % group + lane / 4 * 4 + lane % 2 * group) + lane / 2 % 2;
    const bool live = row < state.live_rows;
    element* const to = state.rows + row * backward.dq_strides.seqlen;
    const float factor = state.factor;
    const int first_chunk = Main::dq_col(first) / 8 + lane % 2;
    NotFinite<f32> not_finite;
#pragma unroll 1
    for (int j = 0; j < n_tiles; j += 2, from += 4 * group) {
      float2 x[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] = __ldcg(from + 2 * c);
      u32 words[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        not_finite.look(x[c].x, x[c].y);
        const bool empty = factor == 0.0f;  // then sums hold anything
        words[c] = ptx::cvt_rn_x2<element>(empty ? 0.0f : factor * x[c].x, empty ? 0.0f : factor * x[c].y);
      }
      if (live) {
        tile::store_chunk<Config::store_bytes, Config::head_dim>(to, backward.dq_strides.dim, first_chunk + j,
                                                                 uint4{words[0], words[1], words[2], words[3]});
      }
    }
    if (unlikely(factor != 0.0f && not_finite.found())) *backward.not_finite = 1;
    __syncwarp();
    if (tile::lane() == 0 && ++state.piece == pieces) ++state.done;
  }
};

// Called by the consumers of Main: writes dq in its dtype, some tiles at a time, once all blocks are done with them.
// The block's first `done` tiles are written.
template <class Config, class Main>
inline void finish_heads(const BackwardParams& backward, int done, int thread) {
  constexpr int together = finished_together;
  const int tiles = RowTile::count<Config>(backward);
#pragma unroll 1
  for (int first = finished_unit(done / together * together, gridDim.x); first < tiles; first += gridDim.x * together) {
    RowTile each[together];
#pragma unroll
    for (int i = 0; i < together; ++i) {
      const bool left = i >= done % together && first + i < tiles;
      each[i] = left ? finished_tile<Config>(backward, first + i) : RowTile::none();
    }
    if (thread == 0) {
#pragma unroll
      for (int i = 0; i < together; ++i) {
        while (each[i].row >= 0 && !is_done<Config>(backward, each[i])) {
        }
      }
    }
    ptx::bar_sync(Main::consumers_barrier, 128 * Main::consumers);
    finish_tiles<Config, Main>(backward, each, thread);
    done = 0;
  }
}

}  // namespace attention
