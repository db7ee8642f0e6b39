// attention: the forward main loop for tiles of few query rows, with mma.sync and cp.async. Such a tile is bound by how
// fast its keys arrive. So the warps of a thread block do not wait for each other: a group of warps, of 16 rows each,
// goes over blocks of keys of its own, which it copies into a ring of its own, and only in the end the sums of all
// groups are put together.
//
// A work says what a tile is. It has, beside what attention/repair.cuh asks for,
//   Seqlen seqlen;                       // of the sequence, for masks and terms
//   BlockRange blocks;                   // the blocks of keys that some row of the tile sees
//   int first_row(), rows();             // the tile's first row, and the end of all rows
//   queries(params), keys(params), values(params);  // sources of rows, as attention/row_source.cuh has them
//   float* lse_row(params, row);         // where the lse of a row goes, if params.lse is not null
// A unit makes it, or has it: work<Work>(argument), `argument` being the kernel's own, whose member `params` are the
// Params above. A source of rows has strides and a length, and `find<count, step>(row, byte)`, which returns something
// whose [index] is the address of that byte of row + index · step; rows from the length on may be asked for, and are
// never read. Those of keys and values also look up where a block of `rows` rows is, once for both and if the sequence
// has any: look_up<rows>(row), and have the source of these rows alone: with<rows>(what was looked up, row).
#pragma once

#include "attention/block_range.cuh"
#include "attention/chains.cuh"
#include "attention/params.cuh"
#include "attention/row_source.cuh"
#include "attention/scoring.cuh"
#include "attention/softmax.cuh"
#include "core/math.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared.cuh"
#include "ptx/thread.cuh"
#include "tile/accumulator.cuh"
#include "tile/gemm.cuh"
#include "tile/gemm_e4m3.cuh"
#include "tile/local.cuh"
#include "tile/shared.cuh"

namespace attention {

template <class Config>
struct MainloopSplitSm80 {
  using element = typename Config::element;
  using kv_element = typename Config::kv_element;
  using Q = tile::SharedTile<element, Config::block_m, Config::tile_head_dim>;
  using K = tile::SharedTile<kv_element, Config::block_n, Config::tile_head_dim>;
  using V = tile::SharedTile<kv_element, Config::block_n, Config::tile_head_dim_v>;
  static constexpr bool e4m3_keys = is_same<kv_element, e4m3>;
  static_assert(is_same<typename Config::mask::Blocks, BlockRange>, "a position is the block itself");

  // Warps that share rows split the columns of V, in whole panels, and each computes those rows' scores for itself.
  static constexpr int row_warps = Config::block_m / 16, group_threads = 32 * row_warps * Config::column_warps;
  static constexpr int groups = Config::num_threads / group_threads, stages = Config::stages;
  static constexpr int cols = round_up(Config::head_dim_v, 16);
  static constexpr int warp_cols = Config::column_warps == 1 ? cols : V::cols / Config::column_warps;
  static_assert(Config::column_warps == 1 || warp_cols * int(sizeof(kv_element)) % V::panel_bytes == 0,
                "a warp's columns of V must be whole panels");
  static_assert(stages >= 2, "a block arrives while the one before it is computed with");

  using Scores = tile::Accumulator<1, Config::block_n>;
  using Out = tile::Accumulator<1, warp_cols>;
  using Statistics = Softmax<ProbabilityOf<Config>, 1>;
  static constexpr int chain_blocks = tile::chain_blocks(Config::block_n);

  // What a group's sums are laid down in. Rows are so far apart that a quarter of a warp writes to all banks.
  static constexpr int sums_stride = Config::tile_head_dim_v + 8;

  struct Stage {
    typename K::Storage k;
    typename V::Storage v;
  };
  union Group {
    Stage ring[stages];
    alignas(16) float sums[Config::block_m * sums_stride];  // when the ring is no longer needed
  };
  struct Shared {
    typename Q::Storage q;
    Group group[groups];
    float2 statistics[groups * Config::block_m];
  };
  static_assert(Config::smem_bytes == sizeof(Shared), "Config and the tiles disagree on shared memory");

  static int group() { return int(ptx::tid_x() / group_threads); }
  static int warp_row() { return int(ptx::tid_x() / 32 % row_warps) * 16; }
  static int warp_col() { return int(ptx::tid_x() % group_threads / 32 / row_warps) * warp_cols; }
  static u32 group_address(u32 smem, int group) { return smem + tile::offset<&Shared::group> + group * sizeof(Group); }

  // Sets out and its statistics to the sums of this thread's group over its share of the work's blocks [begin, end).
  // The first copies are asked for before anything else is done, and while they are on their way meanwhile() is called.
  // All threads of the block call this.
  template <class Work, class Meanwhile>
  static void run(Out& out, Statistics& statistics, const Params& params, const Work& work, int begin, int end,
                  u32 smem, Meanwhile&& meanwhile) {
    const Q q{smem + tile::offset<&Shared::q>};
    // Several tiles read the same keys, as those of the fewest rows never are. A policy that is known while compiling
    // takes no instructions in the loop.
    const u64 policy = Config::block_m > 16 && params.m_blocks > 1 ? ptx::evict_normal() : ptx::evict_first();
    const u32 ring = group_address(smem, group());
    const int thread = ptx::tid_x() % group_threads, first = begin + group();
    const int count = max_of(0, ceil_div(end - first, groups));
    constexpr int rows_ahead = Config::block_n;
    const auto row_of = [&](int index) { return (first + index * groups) * Config::block_n; };
    const auto keys = work.keys(params);
    const auto values = work.values(params);
    const auto look_up = [&](int index) { return keys.template look_up<rows_ahead>(row_of(index)); };
    using Places = decltype(look_up(0));
    const auto load = [&](int index, int slot, const Places& places) {
      const int row = row_of(index);
      const u32 stage = ring + slot * int(sizeof(Stage));
      copy_rows<group_threads, Config::copy_bytes, Config::head_dim>(
          K{stage + tile::offset<&Stage::k>}, row, keys.template with<rows_ahead>(places, row), thread, policy);
      copy_rows<group_threads, Config::copy_bytes, Config::head_dim_v>(
          V{stage + tile::offset<&Stage::v>}, row, values.template with<rows_ahead>(places, row), thread, policy);
    };
    Places firsts[stages - 1] = {};
    Places next{};  // where the next block to be copied is, looked up a step ahead
    if (count > 0) {
#pragma unroll
      for (int index = 0; index < stages - 1; ++index) firsts[index] = look_up(index);
      if (Config::looks_ahead) next = look_up(stages - 1);
    }
#pragma unroll
    for (int index = 0; index < stages - 1; ++index) {
      if (index < count) load(index, index, firsts[index]);
      if (index == 0) {
        copy_rows<Config::num_threads, Config::q_copy_bytes, Config::head_dim>(
            q, work.first_row(), work.queries(params), int(ptx::tid_x()), ptx::evict_normal());
      }
      ptx::cp_async_commit_group();
    }
    meanwhile();

    const OwnRows<Config> rows(params, work, work.first_row() + warp_row() + tile::fragment_row(0, 0));
    const float k_descale = work.k_descale(), scale = exponent_scale<typename Config::variant>(params, k_descale);
    out.zero();
    statistics.init();
    Chains<Config::chains, ProbabilityOf<Config>, 1, Out::cols> chains;
    ptx::cp_async_wait_group<stages - 2>();
    __syncthreads();  // q has arrived, as every thread has copied some of it
    if constexpr (e4m3_keys) {
      tile::interleave<Config::num_threads>(q, int(ptx::tid_x()));
      __syncthreads();
    }
    int slot = 0, free = stages - 1;
#pragma unroll 1
    for (int index = 0; index < count; ++index) {
      ptx::cp_async_wait_group<stages - 2>();
      sync_group();  // the block has arrived, and the group is done with the one before it
      if (index + stages - 1 < count) {
        if (!Config::looks_ahead) next = look_up(index + stages - 1);
        load(index + stages - 1, free, next);
        if (Config::looks_ahead) next = look_up(index + stages);
      }
      ptx::cp_async_commit_group();

      const u32 stage = ring + slot * int(sizeof(Stage));
      const int block = first + index * groups;
      Scores scores;
      warp::gemm_abt<Config::head_dim>(scores, q, K{stage + tile::offset<&Stage::k>}, warp_row());
      const OwnRowsPlace<Config> place{params, work.seqlen, rows, work.batch(), block * Config::block_n, k_descale};
      const bool boundary = work.blocks.template is_boundary<Config::mask::hides_first>(block);
      if (Config::variant::pairs && boundary) mask(scores, place);
      apply(scores, place);
      if (boundary) mask(scores, place);
      statistics.update(scores, out, scale, 0);
      weigh(scores, place);
      warp::gemm_ab(out, scores, V{stage + tile::offset<&Stage::v>}, warp_col());
      free = slot;
      slot = slot == stages - 1 ? 0 : slot + 1;
      const int done = index + 1;
      const bool last = done == count;
      if (Config::chains && unlikely(last ? done > chain_blocks : done % chain_blocks == 0)) {
        chains.end(out, statistics, scale, done == chain_blocks, last);
        if (!last) statistics.init();
      }
    }
  }

  // Lays down what `run` has made, for the parts of rows below. A barrier of all threads has to follow.
  static void lay_down(const Out& out, const Statistics& statistics, u32 smem) {
    sync_group();  // the group is done with its ring
    const u32 sums = group_address(smem, group());
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warp_row() + tile::fragment_row(0, i);
      const float sum = warp::quad_sum(fabsf(statistics.row_sum[0][i]));
      if (warp_col() + tile::fragment_col() == 0) {
        const float signed_sum = Statistics::signed_sum(sum, statistics.is_steep(0, i));
        ptx::st_shared_v2(statistics_address(smem, group(), row), __float_as_uint(statistics.base[0][i]),
                          __float_as_uint(signed_sum));
      }
      if constexpr (e4m3_keys) {
#pragma unroll
        for (int j = 0; j < Out::cols / 8; j += 2) {
          const float (&even)[4] = out.x[0][j], (&odd)[4] = out.x[0][j + 1];
          ptx::st_shared_v4(sums + (row * sums_stride + warp_col() + 8 * j + tile::quad_col()) * int(sizeof(float)),
                            uint4{__float_as_uint(even[2 * i]), __float_as_uint(odd[2 * i]),
                                  __float_as_uint(even[2 * i + 1]), __float_as_uint(odd[2 * i + 1])});
        }
        continue;
      }
#pragma unroll
      for (int j = 0; j < Out::cols / 8; ++j) {
        ptx::st_shared_v2(sums + (row * sums_stride + warp_col() + 8 * j + tile::fragment_col()) * int(sizeof(float)),
                          __float_as_uint(out.x[0][j][2 * i]), __float_as_uint(out.x[0][j][2 * i + 1]));
      }
    }
  }

  // What has been laid down, as split_merge.cuh takes it: a part is a group's.
  struct Parts {
    u32 smem;

    float2 statistics(int group, int row) const { return ptx::ld_shared_f32x2(statistics_address(smem, group, row)); }
    uint4 sums(int group, int row, int quad) const {
      return ptx::ld_shared_v4(group_address(smem, group) + (row * sums_stride + 4 * quad) * int(sizeof(float)));
    }
  };

 private:
  static u32 statistics_address(u32 smem, int group, int row) {
    return smem + tile::offset<&Shared::statistics> + (group * Config::block_m + row) * int(sizeof(float2));
  }

  // Barrier 0 is that of all threads.
  static void sync_group() {
    if constexpr (group_threads == 32)
      __syncwarp();
    else
      ptx::bar_sync(1 + group(), group_threads);
  }
};

}  // namespace attention
