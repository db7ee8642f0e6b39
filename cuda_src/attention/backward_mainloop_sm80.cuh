// attention: the backward's main loop with mma.sync and cp.async, for sm_80 and every newer GPU. A thread block keeps a
// block of keys and goes over the tiles of queries that see any of them.
//
// FlashAttention-2 (Dao, 2023), Algorithm 2, with transposed scores: rows are keys. P and dS go through shared memory,
// so that every product can be divided among warps as suits it.
#pragma once

#include "attention/backward_finish.cuh"
#include "attention/backward_params.cuh"
#include "attention/backward_prepare.cuh"
#include "attention/backward_rows.cuh"
#include "attention/backward_scores_sm80.cuh"
#include "attention/backward_sums_sm80.cuh"
#include "attention/backward_work.cuh"
#include "attention/epilogue.cuh"
#include "attention/params.cuh"
#include "attention/row_source.cuh"
#include "core/math.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared.cuh"
#include "ptx/sync.cuh"
#include "ptx/thread.cuh"
#include "tile/accumulator.cuh"
#include "tile/copy.cuh"
#include "tile/gemm.cuh"
#include "tile/local.cuh"
#include "tile/shared.cuh"
#include "tile/staged.cuh"

namespace attention {

template <class Config>
struct BackwardMainloopSm80 {
  using element = typename Config::element;
  using Tiles = typename Config::mask::Tiles;
  static constexpr int block_m = Config::block_m, block_n = Config::block_n, warps = Config::num_threads / 32;
  static_assert((block_m & (block_m - 1)) == 0, "P's rows are swizzled by powers of two");
  using K = tile::SharedTile<element, block_n, Config::tile_head_dim>;
  using V = tile::SharedTile<element, block_n, Config::tile_head_dim_v>;
  using Q = tile::SharedTile<element, block_m, Config::tile_head_dim>;
  using Dout = tile::SharedTile<element, block_m, Config::tile_head_dim_v>;
  using P = tile::SharedTile<element, block_n, block_m>;  // dS has the same

  // The divisions of P and dS, of dK and dV, and of dQ. That of P and dS may leave warps idle, where a tile is small.
  // With Config::halves the first half of the warps has dV and the second dK: a part then has twice the columns or rows
  // for the same registers, so that ldmatrix, which takes as long as the products, reads less for each.
  using ScoreDivision = Division<block_n, block_m, Config::score_row_warps, Config::score_column_warps>;
  static constexpr int key_warps = Config::halves ? warps / 2 : warps;
  template <int cols>
  using KeyDivision = Division<block_n, cols, Config::key_row_warps, key_warps / Config::key_row_warps>;
  using DkDivision = KeyDivision<Config::tile_head_dim>;
  using DvDivision = KeyDivision<Config::tile_head_dim_v>;
  using DqDivision = Division<block_m, Config::tile_head_dim, Config::dq_row_warps, warps / Config::dq_row_warps>;
  using Variant = typename Config::variant;
  using Dk = typename DkDivision::Part;
  using Dv = typename DvDivision::Part;
  static_assert(!Config::halves || (is_same<K, V> && Config::num_threads % 64 == 0), "the halves have the same to do");

  // A thread's parts of dk and dv. With Config::halves it has a part of one of them, which is here as dv.
  struct Sums {
    Dv dv;
    Dk dk;

    void zero() {
      dv.zero();
      if constexpr (!Config::halves) dk.zero();
    }
  };

  // Whether this thread's half of the warps has dk.
  static bool has_dk() { return ptx::tid_x() >= Config::num_threads / 2; }

  // The order of numbers in a tile of dq_sum: for the kernel that finishes dq.
  using Dq = typename DqDivision::Part;
  static constexpr int dq_threads = Config::num_threads, dq_group = dq_threads, dq_vector = 1;
  static constexpr bool first_stores = false;
  static int dq_row(int thread) { return DqDivision::row(thread); }
  static int dq_col(int thread) { return DqDivision::col(thread); }

  // Warps that have a part of P or dS.
  static constexpr int score_warps = Config::score_halves ? warps : ScoreDivision::warps;

  static constexpr int chain_steps = tile::chain_blocks(block_m);

  // Tiles of queries in shared memory: with two, one arrives while the other is worked on.
  static constexpr int stages = Config::stages;
  static constexpr int rows_bytes = block_m * sizeof(float);  // bytes of row_lse, and of row_delta

  struct Stage {
    typename Q::Storage q;
    typename Dout::Storage dout;
    float lse[block_m], delta[block_m];
  };

  struct Shared {
    typename K::Storage k;
    typename V::Storage v;
    typename P::Storage p, ds;
    Stage stages[BackwardMainloopSm80::stages];
  };
  // Behind it, with Config::score_halves, P in float32, in the order of the threads that have it.
  static constexpr int smem_bytes = sizeof(Shared) + (Config::score_halves ? block_m * block_n * 4 : 0);

  // Named barriers: of all threads, when P in float32 is there, and of each half, when its own tile is.
  enum Barrier : u32 { exact_barrier = 1, p_barrier, ds_barrier };

  // A tile of queries, of one of the heads that share the keys.
  struct Tile {
    int head, position;  // the latter among the work's tiles

    Tile next(const Tiles& tiles) const {
      return position + 1 < tiles.end ? Tile{head, position + 1} : Tile{head + 1, tiles.begin};
    }
  };

  // The state lies in shared memory and is read where it is needed: the accumulators leave no registers to carry it in.
  struct State {
    BackwardWork<Config> work;
    Tile tiles[2];  // the present tile and the next, by turns
  };

  const BackwardParams& backward;
  State& state;
  const BackwardWork<Config>& work;
  u32 smem;

  K k() const { return {smem + tile::offset<&Shared::k>}; }
  V v() const { return {smem + tile::offset<&Shared::v>}; }
  P p() const { return {smem + tile::offset<&Shared::p>}; }
  P ds() const { return {smem + tile::offset<&Shared::ds>}; }
  u32 exact() const { return smem + int(sizeof(Shared)); }

  u32 buffer(int index) const {
    return smem + tile::offset<&Shared::stages> + (stages == 1 ? 0 : index) * int(sizeof(Stage));
  }
  static Q q(u32 stage) { return {stage + tile::offset<&Stage::q>}; }
  static Dout dout(u32 stage) { return {stage + tile::offset<&Stage::dout>}; }
  static u32 lse(u32 stage) { return stage + tile::offset<&Stage::lse>; }
  static u32 delta(u32 stage) { return stage + tile::offset<&Stage::delta>; }

  // Sets dk and dv, but for the scale of dk, to the sums over the work's tiles, of which there is one at least, and
  // adds to dq_sum. There are two barriers per tile, before P and behind dS, and with a single stage a third, behind
  // which the next tile may arrive. With Config::score_halves that behind dS is each half's own, and the third is there
  // with any stages, since dq takes all of dS.
  void run(Sums& sums) const {
    const int first_key = work.n_block * block_n;
    load<Config::head_dim>(k(), first_key, keys(backward.forward.k, backward.forward.k_strides));
    load<Config::head_dim_v>(v(), first_key, keys(backward.forward.v, backward.forward.v_strides));
    load_queries({work.head * backward.forward.qheads_per_khead, work.tiles.begin}, buffer(0));
    // In local memory, and not in Sums, which would be drawn into it.
    tile::LocalSums<Dv::m_tiles, Dv::cols> local_dv;
    tile::LocalSums<Dk::m_tiles, Dk::cols> local_dk;
    const auto take_over = [&](bool first, bool last) {
      local_dv.take_over(sums.dv, first, last);
      if constexpr (!Config::halves) local_dk.take_over(sums.dk, first, last);
    };
    sums.zero();
    int index = 0, steps = 0;
    do {
      const Tile& tile = state.tiles[index];
      const u32 at = buffer(index);
      index ^= 1;
      if constexpr (stages == 2) {
        // Behind the last tile no row is live: a branch around the copies would part the products.
        const Tile next = tile.next(work.tiles);
        const auto q_chunks = find_q(next, buffer(index), is_live(next));
        const auto dout_chunks = find_dout(next, buffer(index), is_live(next));
        wait_for_tile(tile, index);
        make_scores(
            tile, at,
            [&] {
              load_chunks<Config, Config::head_dim>(q_chunks);
              load_chunks<Config, Config::head_dim_v>(dout_chunks);
            },
            [&] {
              const Tile next = tile.next(work.tiles);
              if (is_live(next)) load_numbers(next, buffer(index));
              ptx::cp_async_commit_group();
            });
      } else {
        wait_for_tile(tile, index);
        make_scores(tile, at, [] {}, [] {});
      }
      wait_for_scores();
      add_keys(sums, at);
      if (Config::score_halves || stages == 1)
        __syncthreads();  // every warp is done with q and dout, and dS is complete
      if constexpr (stages == 1) {
        const Tile next = tile.next(work.tiles);
        if (is_live(next)) load_queries(next, at);
      }
      add_dq(tile);
      if (Config::chains && unlikely(++steps % chain_steps == 0)) {
        take_over(steps == chain_steps, false);
      }
    } while (is_live(state.tiles[index]));
    if (Config::chains && unlikely(steps >= chain_steps)) {
      take_over(false, true);
    }
  }

  // Waits until a tile has arrived, and every warp is done with the one before, whose place the next one takes.
  void wait_for_tile(const Tile& tile, int next) const {
    ptx::cp_async_wait_group<0>();
    __syncthreads();
    if (threadIdx.x == 0) state.tiles[next] = tile.next(work.tiles);
  }

  // This warp's part of P and dS, and of the copies; a warp without a part of the former copies all the same.
  template <class CopyRows, class CopyNumbers>
  void make_scores(const Tile& tile, u32 at, CopyRows&& copy_rows, CopyNumbers&& copy_numbers) const {
    if (score_warps == warps || threadIdx.x < 32 * score_warps) {
      BackwardScoresSm80<Config, BackwardMainloopSm80>{*this, tile, at}.make(copy_rows, copy_numbers);
    } else {
      copy_rows();
      copy_numbers();
    }
  }

  // Waits until the tiles are complete that this warp's keys take. Barriers have constant numbers: for one that is not,
  // the block would reserve all sixteen.
  void wait_for_scores() const {
    if constexpr (!Config::score_halves) {
      __syncthreads();  // P and dS are complete
    } else if (has_dk()) {
      ptx::bar_sync(ds_barrier, Config::num_threads / 2);
    } else {
      ptx::bar_sync(p_barrier, Config::num_threads / 2);
    }
  }

  // dv += P·dout, dk += dS·Q.
  void add_keys(Sums& sums, u32 at) const {
    if constexpr (Config::halves) {
      const bool second = has_dk();
      warp::gemm_ab(sums.dv, second ? ds() : p(), second ? q(at) : dout(at), DvDivision::row(), DvDivision::col());
    } else {
      warp::gemm_ab(sums.dv, p(), dout(at), DvDivision::row(), DvDivision::col());
      warp::gemm_ab(sums.dk, ds(), q(at), DkDivision::row(), DkDivision::col());
    }
  }

  // Adds dS·K to the tile's dq_sum, or writes it to dq, where nobody else adds to that. There are two passes over the
  // columns where all of them would take too many registers; with Config::score_halves fewer of these are taken.
  void add_dq(const Tile& tile) const {
    const bool whole = writes_dq<Config>(work.seqlen);
    constexpr int most = Config::sums_by_rows && Dq::n_tiles % 4 == 0 ? 24 : Config::score_halves ? 64 : 48;
    constexpr int passes = Dq::m_tiles * Dq::n_tiles * 4 > most ? 2 : 1, n_tiles = Dq::n_tiles / passes;
    const int index = sum_tile<Config>(backward, work, tile.head, m_block(tile));
    float* const sums = backward.dq_sum + i64(index) * (block_m * Config::tile_head_dim) + ptx::tid_x();
#pragma unroll
    for (int pass = 0; pass < passes; ++pass) {
      tile::Accumulator<Dq::m_tiles, 8 * n_tiles> dq;
      dq.zero();
      warp::gemm_atb(dq, ds(), k(), DqDivision::row(), DqDivision::col() + 8 * n_tiles * pass);
      if (whole) {
        write_dq(dq, tile, DqDivision::col() + 8 * n_tiles * pass);
        continue;
      }
      if (Config::deterministic && pass == 0) wait_for_turn(tile, backward.turns + index);
      if constexpr (Config::sums_by_rows) {
        add_rows<Config>(backward, work, tile.head, m_block(tile) * block_m + DqDivision::row(),
                         DqDivision::col() + 8 * n_tiles * pass, dq);
        continue;
      }
      add_columns<Dq, dq_threads>(sums, n_tiles * pass, dq);
    }
    if (Config::deterministic && !whole) {
      __syncthreads();  // every warp has added
      if (threadIdx.x == 0) {
        __threadfence();
        ptx::red_release_gpu_add(backward.turns + index, 1);
      }
    }
  }

  // Writes this warp's part of a tile of dq, which lacks only its scale, from column first_col on.
  template <class Part>
  void write_dq(const Part& dq, const Tile& tile, int first_col) const {
    const Strides& strides = backward.dq_strides;
    element* const rows = const_cast<element*>(origin(backward.dq, strides, tile.head, work.seqlen.q_first_row));
    const int first_row = m_block(tile) * block_m + DqDivision::row();
    NotFinite<f32> not_finite;
#pragma unroll
    for (int t = 0; t < Part::m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + tile::fragment_row(t, i);
        write_row<Config::store_bytes, Config::head_dim>(rows + row * strides.seqlen, strides.dim, row < work.seqlen.q,
                                                         dq, t, i, backward.forward.softmax_scale, not_finite,
                                                         first_col);
      }
    }
    if (unlikely(not_finite.found())) *backward.not_finite = 1;
  }

  void wait_for_turn(const Tile& tile, const i32* turn) const {
    if (threadIdx.x == 0) {
      const int wanted = turn_of(backward, work, m_block(tile));
      while (ptx::ld_acquire_gpu(turn) != wanted) {
      }
    }
    __syncthreads();
  }

  int m_block(const Tile& tile) const { return work.tiles.block(tile.position); }

  bool is_live(const Tile& tile) const { return tile.head < (work.head + 1) * backward.forward.qheads_per_khead; }

  // Starts the copies of a tile's q, dout, row_lse and row_delta.
  void load_queries(const Tile& tile, u32 to) const {
    load_chunks<Config, Config::head_dim>(find_q(tile, to, true));
    load_chunks<Config, Config::head_dim_v>(find_dout(tile, to, true));
    load_numbers(tile, to);
    ptx::cp_async_commit_group();
  }

  // The thread's chunks of a tile's q and dout, or those of zeros.
  auto find_q(const Tile& tile, u32 to, bool live) const {
    auto rows = queries(backward.forward.q, backward.forward.q_strides, tile.head);
    if (!live) rows.length = 0;
    return find_chunks<Config>(q(to), m_block(tile) * block_m, rows);
  }
  auto find_dout(const Tile& tile, u32 to, bool live) const {
    auto rows = queries(backward.dout, backward.dout_strides, tile.head);
    if (!live) rows.length = 0;
    return find_chunks<Config>(dout(to), m_block(tile) * block_m, rows);
  }

  // Starts the copies of a tile's row_lse and row_delta.
  void load_numbers(const Tile& tile, u32 to) const {
    const int first_row = m_block(tile) * block_m;
    constexpr int chunks = rows_bytes / 16;
    static_assert(2 * chunks <= Config::num_threads, "a thread copies at most one");
    if (threadIdx.x < 2 * chunks) {
      const float* const rows = threadIdx.x < chunks ? backward.row_lse : backward.row_delta;
      const int tile_row = first_row + threadIdx.x % chunks * aligned_rows;
      i64 row = workspace_row<Config>(backward, work, tile.head) + tile_row;
      if (Config::varlen && tile_row >= work.seqlen.q) row = -aligned_rows;  // padding, not another's rows
      ptx::cp_async<16>(lse(to) + threadIdx.x * 16, rows + row, 16);
    }
  }

  const element* origin(const void* pointer, const Strides& strides, int head, int row) const {
    return static_cast<const element*>(pointer) + work.batch * strides.batch + head * strides.head +
           row * strides.seqlen;
  }

  PointedRows<element> keys(const void* array, const Strides& strides) const {
    return {origin(array, strides, work.head, work.seqlen.k_first_row), strides, work.seqlen.k};
  }

  PointedRows<element> queries(const void* array, const Strides& strides, int head) const {
    return {origin(array, strides, head, work.seqlen.q_first_row), strides, work.seqlen.q};
  }

  template <int valid_cols, class Tile>
  static void load(const Tile& to, int row, const PointedRows<element>& from) {
    load_chunks<Config, valid_cols>(find_chunks<Config>(to, row, from));
  }

  // Writes the block's rows of dk and dv; the tiles of K and V are free when this is called.
  void write(Sums& sums) const {
    const float k_factor = backward.forward.softmax_scale, v_factor = Variant::gain(backward.forward.terms);
    NotFinite<f32> not_finite;
    scale_live_rows(sums.dv, DvDivision::row(), Config::halves && has_dk() ? k_factor : v_factor);
    not_finite.look_at(sums.dv);
    if constexpr (Config::halves) {
      stage(has_dk() ? k() : v(), sums.dv, DvDivision::row(), DvDivision::col());
    } else {
      scale_live_rows(sums.dk, DkDivision::row(), k_factor);
      not_finite.look_at(sums.dk);
      stage(k(), sums.dk, DkDivision::row(), DkDivision::col());
      stage(v(), sums.dv, DvDivision::row(), DvDivision::col());
    }
    if (unlikely(not_finite.found())) *backward.not_finite = 1;
    __syncthreads();
    store<Config::head_dim>(k(), backward.dk, backward.dk_strides);
    store<Config::head_dim_v>(v(), backward.dv, backward.dv_strides);
  }

  // Rows past the live length get zeros, whatever dout holds.
  template <class Sums>
  void scale_live_rows(Sums& sums, int first_row, float factor) const {
#pragma unroll
    for (int t = 0; t < Sums::m_tiles; ++t) {
#pragma unroll
      for (int j = 0; j < Sums::n_tiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = work.n_block * block_n + first_row + tile::fragment_row(t, i / 2);
          sums.x[t][j][i] = row < work.seqlen.k ? factor * sums.x[t][j][i] : 0.0f;
        }
      }
    }
  }

  template <int valid_cols, class Tile>
  void store(const Tile& from, void* gradient, const Strides& strides) const {
    element* const pointer = const_cast<element*>(origin(gradient, strides, work.head, work.seqlen.k_first_row));
    const tile::GlobalRows<element> rows{pointer, strides.seqlen, strides.dim};
    block::store<valid_cols>(
        block::Chunks<Config::num_threads, Config::copy_unroll, Config::store_bytes, Tile, element>(
            from, rows, work.n_block * block_n, work.key_rows));
  }
};

}  // namespace attention
