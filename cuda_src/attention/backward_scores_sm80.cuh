// attention: how the backward for sm_80 comes from a tile of queries to the tiles of P and dS, from which other warps
// read.
#pragma once

#include "attention/kept.cuh"
#include "attention/place.cuh"
#include "attention/scoring.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/barrier.cuh"
#include "ptx/math.cuh"
#include "ptx/shared.cuh"
#include "ptx/thread.cuh"
#include "tile/accumulator.cuh"
#include "tile/gemm.cuh"
#include "tile/staged.cuh"

namespace attention {

// A warp's part of P and dS of one tile, whose rows lie at `at`. Where the part lies is found anew for each use, since
// no register is left to carry its address through the products.
template <class Config, class Main>
struct BackwardScoresSm80 {
  using element = typename Config::element;
  using Variant = typename Config::variant;
  using Division = typename Main::ScoreDivision;
  using Scores = typename Division::Part;  // of dP as well
  using P = typename Main::P;
  using Numbers = ColumnNumbers<Scores::cols>;
  using StagedPairs = tile::StagedPairs<P>;
  using StagedSquares = tile::StagedSquares<P, Scores::cols>;
  static constexpr int squares = Scores::m_tiles * (Scores::cols / 16);  // of 16 keys by 16 queries

  // Whether scores become probabilities square by square, and these factors of dP - delta, without terms between them.
  static constexpr bool by_squares =
      !is_same<element, f32> && !Variant::shapes && !Variant::weighs && !Variant::drops && !Variant::has_gradient;

  const Main& main;
  const typename Main::Tile& tile;
  u32 at;

  // The tiles of P and dS ← this warp's part of them. The rows of the next tile are copied beside the first products:
  // in front of them ldmatrix would wait behind the copies. Its numbers are copied behind the scores.
  template <class CopyRows, class CopyNumbers>
  void make(CopyRows&& copy_rows, CopyNumbers&& copy_numbers) const {
    if constexpr (Config::score_halves) {
      make_by_halves(copy_rows, copy_numbers);
    } else {
      Scores scores;
      warp::gemm_abt<Config::head_dim>(scores, tile::Operand<0>{}, main.k(), Main::q(at), Division::row(),
                                       Division::col(), copy_rows);
      copy_numbers();
      mask_unshaped<Config>(scores, place(), is_boundary());
      Numbers row_lse;
      row_lse.load(numbers(Main::lse(at)));
      if constexpr (by_squares)
        make_by_squares(scores, row_lse);
      else
        make_with_terms(scores, row_lse);
    }
  }

 private:
  void make_with_terms(Scores& scores, const Numbers& row_lse) const {
    // These products come before the probabilities, so that exponentials run beside them.
    Scores dp;
    warp::gemm_abt<Config::head_dim_v>(dp, main.v(), Main::dout(at), Division::row(), Division::col());
    // Scores become what dP - delta is multiplied by.
    tile::Accumulator<Scores::m_tiles, Variant::holds ? Scores::cols : 16> rests;
    // What the products have left, where terms read it.
    tile::Accumulator<Scores::m_tiles, Variant::reads_score ? Scores::cols : 16> read;
    if constexpr (Variant::reads_score) read = scores;
    const StagedPairs to_p(main.p(), Division::row(), Division::col());
    Kept<Config, Scores::m_tiles, Scores::cols> kept;
    kept.find([&] { return place(); });
    const bool asks = Variant::hides && !Variant::hides_in_full && is_boundary();
    probabilities<Config>(scores, place(), kept, row_lse, asks, [&](int t, int i, int j, const ScorePair& pair) {
      to_p.store(t, i, j, pair.weight[0], pair.weight[1]);
      put(scores, t, i, j, pair.ds_factor);
      if constexpr (Variant::holds) put(rests, t, i, j, pair.rest);
    });
    const LoadedNumbers row_delta{numbers(Main::delta(at))};
    gradients<Config, true>(
        dp, place(), kept, row_delta, [&](int t, int i, int j) { return pair_of(read, t, i, j); },
        [&](int t, int i, int j) { return pair_of(scores, t, i, j); },
        [&](int t, int i, int j) { return pair_of(rests, t, i, j); },
        [&](int t, int i, int j, float low, float high) { put(scores, t, i, j, {low, high}); });
    // Stores come behind all loads, which otherwise wait for each other.
    const StagedPairs to_ds(main.ds(), Division::row(), Division::col());
    tile::for_each_pair<Scores::m_tiles, Scores::cols>(
        [&](int t, int i, int j) { to_ds.store(t, i, j, scores.x[t][j][2 * i], scores.x[t][j][2 * i + 1]); });
  }

  // A square of scores becomes probabilities while products of dP run that were issued before; it is stored behind what
  // the step after that reads, since accesses to shared memory keep their order.
  void make_by_squares(Scores& scores, const Numbers& row_lse) const {
    constexpr int steps = ceil_div(Config::head_dim_v, 16), per_step = ceil_div(squares, steps);
    const float scale = exponent_scale<Variant>(main.backward.forward);
    const StagedSquares to_p(main.p(), Division::row(), Division::col());
    Scores dp;
    warp::gemm_abt_beside<Config::head_dim_v>(
        dp, main.v(), Main::dout(at), Division::row(), Division::col(), [&](int step) {
#pragma unroll
          for (int square = max_of(0, (step - 1) * per_step); square < min_of(squares, step * per_step); ++square)
            store_square(to_p, scores, square);
#pragma unroll
          for (int square = step * per_step; square < min_of(squares, (step + 1) * per_step); ++square)
            exponentiate(scores, square, scale, row_lse);
        });
    Numbers row_delta;
    row_delta.load(numbers(Main::delta(at)));
#pragma unroll
    for (int square = (steps - 1) * per_step; square < squares; ++square) store_square(to_p, scores, square);
    tile::for_each_pair<Scores::m_tiles, Scores::cols>([&](int t, int i, int j) {
      const float2 p = pair_of(scores, t, i, j), d = pair_of(dp, t, i, j);
      put(scores, t, i, j, {p.x * (d.x - row_delta.x[j].x), p.y * (d.y - row_delta.x[j].y)});
    });
    store_squares(main.ds(), scores);
  }

  // The first half of the warps makes P and the second dP, all at the same time and with the same instructions. P goes
  // in float32 to the threads that have the same entries of dP. Each half waits only for its own P or dS, so that dv
  // begins before dS is made.
  template <class CopyRows, class CopyNumbers>
  void make_by_halves(CopyRows&& copy_rows, CopyNumbers&& copy_numbers) const {
    static_assert(!Config::score_halves || (Config::halves && by_squares && 2 * Division::warps == Main::warps),
                  "the halves have the same to do");
    const bool makes_ds = Main::has_dk();
    Scores x;
    warp::gemm_abt<Config::head_dim>(x, tile::Operand<0>{}, makes_ds ? main.v() : main.k(),
                                     makes_ds ? Main::dout(at) : Main::q(at), Division::row(), Division::col(),
                                     copy_rows);
    copy_numbers();
    Numbers subtracted;
    subtracted.load(numbers(makes_ds ? Main::delta(at) : Main::lse(at)));
    // Each thread has 16 bytes beside those of its neighbours for every four entries.
    constexpr int threads = Config::num_threads / 2, group_bytes = 16 * threads;
    const u32 exact = main.exact() + ptx::tid_x() % threads * 16;
    if (makes_ds) {
      tile::for_each_pair<Scores::m_tiles, Scores::cols>([&](int t, int i, int j) {
        const float2 d = pair_of(x, t, i, j);
        put(x, t, i, j, {d.x - subtracted.x[j].x, d.y - subtracted.x[j].y});
      });
      ptx::bar_sync(Main::exact_barrier, Config::num_threads);
#pragma unroll
      for (int t = 0; t < Scores::m_tiles; ++t) {
#pragma unroll
        for (int j = 0; j < Scores::n_tiles; ++j) {
          const uint4 p = ptx::ld_shared_v4(exact + (t * Scores::n_tiles + j) * group_bytes);
          x.x[t][j][0] *= __uint_as_float(p.x);
          x.x[t][j][1] *= __uint_as_float(p.y);
          x.x[t][j][2] *= __uint_as_float(p.z);
          x.x[t][j][3] *= __uint_as_float(p.w);
        }
      }
    } else {
      mask_unshaped<Config>(x, place(), is_boundary());
      const float scale = exponent_scale<Variant>(main.backward.forward);
#pragma unroll
      for (int square = 0; square < squares; ++square) exponentiate(x, square, scale, subtracted);
#pragma unroll
      for (int t = 0; t < Scores::m_tiles; ++t) {
#pragma unroll
        for (int j = 0; j < Scores::n_tiles; ++j) {
          const float (&p)[4] = x.x[t][j];
          ptx::st_shared_v4(
              exact + (t * Scores::n_tiles + j) * group_bytes,
              uint4{__float_as_uint(p[0]), __float_as_uint(p[1]), __float_as_uint(p[2]), __float_as_uint(p[3])});
        }
      }
      ptx::bar_arrive(Main::exact_barrier, Config::num_threads);
    }
    store_squares(makes_ds ? main.ds() : main.p(), x);
  }

  TransposedPlace<Config> place() const {
    return {main.backward.forward,
            main.work.seqlen,
            main.work.batch,
            tile.head,
            main.work.n_block * Config::block_n + Division::row(),
            main.m_block(tile) * Config::block_m + Division::col()};
  }

  bool is_boundary() const { return main.work.tiles.is_boundary(tile.position); }

  // Of a tile's numbers, those of the columns of the part.
  static u32 numbers(u32 of_tile) { return of_tile + Division::col() * int(sizeof(float)); }

  // Squares are counted down the columns.
  static constexpr int part_of(int square) { return square % Scores::m_tiles; }
  static constexpr int step_of(int square) { return square / Scores::m_tiles; }

  // A square of scores ← probabilities.
  static void exponentiate(Scores& scores, int square, float scale, const Numbers& row_lse) {
#pragma unroll
    for (int j = 2 * step_of(square); j < 2 * step_of(square) + 2; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = scores.x[part_of(square)][j][i];
        x = ptx::ex2_approx_ftz(fmaf(x, scale, -(i % 2 == 0 ? row_lse.x[j].x : row_lse.x[j].y)));
      }
    }
  }

  static void store_square(const StagedSquares& to, const Scores& from, int square) {
    u32 words[4];
    tile::pack_square<element>(words, from, part_of(square), step_of(square));
    to.store(part_of(square), step_of(square), words);
  }

  static void store_squares(const P& tile, const Scores& from) {
    const StagedSquares to(tile, Division::row(), Division::col());
#pragma unroll
    for (int square = 0; square < squares; ++square) store_square(to, from, square);
  }

  // Entries 2 * i and 2 * i + 1 of the accumulator's part (t, j).
  template <class Part>
  static void put(Part& to, int t, int i, int j, const float (&pair)[2]) {
    to.x[t][j][2 * i] = pair[0];
    to.x[t][j][2 * i + 1] = pair[1];
  }
  template <class Part>
  static float2 pair_of(const Part& from, int t, int i, int j) {
    return {from.x[t][j][2 * i], from.x[t][j][2 * i + 1]};
  }

  // Numbers of columns, read where they are needed.
  struct LoadedNumbers {
    u32 address;

    float2 of(int, int, int j) const {
      return ptx::ld_shared_f32x2(address + (tile::fragment_col() + 8 * j) * sizeof(float));
    }
  };
};

}  // namespace attention
