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
    ptx::red_release_gpu_add(heads_done(backward, work.batch, work.head * backward.forward.qheads_per_khead), 1);
  }

  static i32* heads_done(const BackwardParams& backward, int batch, int query_head) {
    return backward.heads_done + key_head(backward.forward, batch, query_head);
  }
};

// Called by the consumers of Main: writes dq in its dtype, some tiles at a time, once all blocks are done with a head.
template <class Config, class Main>
inline void finish_heads(const BackwardParams& backward, int thread) {
  constexpr int together = 4;
  const int m_blocks = backward.forward.m_blocks,
            tiles = m_blocks * backward.forward.num_heads_q * backward.forward.batch;
#pragma unroll 1
  for (int first = blockIdx.x * together; first < tiles; first += gridDim.x * together) {
    RowTile each[together];
#pragma unroll
    for (int i = 0; i < together; ++i) {
      each[i] = first + i < tiles ? RowTile::find<Config>(backward, first + i, m_blocks) : RowTile::none();
    }
    if (thread == 0) {
#pragma unroll
      for (int i = 0; i < together; ++i) {
        const i32* const done = DqSum<Config, Main::consumers>::heads_done(backward, each[i].batch, each[i].head);
        while (ptx::ld_acquire_gpu(done) != backward.n_blocks) {
        }
      }
    }
    ptx::bar_sync(Main::consumers_barrier, 128 * Main::consumers);
    finish_tiles<Config, Main>(backward, each, thread);
  }
}

}  // namespace attention
