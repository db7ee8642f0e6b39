// attention: what the backward's main loops for sm_90 share: loading tiles, and the arithmetic between their products.
#pragma once

#include "attention/backward_params.cuh"
#include "attention/backward_rows.cuh"
#include "attention/backward_work.cuh"
#include "attention/row_source.cuh"
#include "attention/scoring.cuh"
#include "core/math.cuh"
#include "ptx/convert.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "tile/accumulator.cuh"
#include "tile/pipeline.cuh"
#include "tile/tensor_sm90.cuh"

namespace attention {

// What one of the two loaders loads: Q, K and row_lse, for scores, or dout, V and row_delta, for their gradients.
enum class Side { scores, gradients };

// Used by one thread: loads one side of the work's block of keys, and of every tile of queries that sees the block,
// into the stages of a main loop.
template <class Config, class Loop, Side side>
struct TileLoader {
  const Loop& loop;
  const BackwardArgument& argument;
  typename Loop::Progress progress;  // the tile of queries, and the block of keys

  void load(const BackwardWork<Config>& work) {
    const BackwardParams& backward = argument.params;
    if (work.tiles.empty()) return;
    const auto at_keys = progress.second();
    if constexpr (side == Side::scores)
      load_keys(loop.keys(at_keys), loop.k(at_keys), argument.k, work);
    else
      load_keys(loop.values(at_keys), loop.v(at_keys), argument.v, work);
    const auto& at = progress.first;
    for_each_query_tile<Config::chains>(backward.forward, work, [&](int head, int position) {
      const int m_block = work.tiles.block(position);
      const i64 row = workspace_row<Config>(backward, work, head) + m_block * Config::block_m;
      if constexpr (side == Side::scores)
        load_queries(loop.queries(), loop.q(at.stage()), argument.q, loop.lse(at.stage()), backward.row_lse + row, work,
                     head, m_block, position);
      else
        load_queries(loop.gradients(), loop.dout(at.stage()), argument.dout, loop.delta(at.stage()),
                     backward.row_delta + row, work, head, m_block, position);
    });
  }

 private:
  template <class KeyRing, class Tile>
  void load_keys(const KeyRing& ring, const Tile& to, const ptx::TensorMap& map, const BackwardWork<Config>& work) {
    const typename KeyRing::Cursor at{progress.second().count};
    ring.wait_empty(at);
    ring.expect(at, Tile::bytes);
    load_rows<Config, Tile, Loop::key_box>(to, map, ring.full(at.stage()), work.n_block * Config::block_n, work.keys());
    progress.advance_second();
  }

  template <class Tile>
  void load_queries(const typename Loop::Ring& ring, const Tile& to, const ptx::TensorMap& map, u32 to_numbers,
                    const float* numbers, const BackwardWork<Config>& work, int head, int m_block, int position) {
    typename Loop::Ring::Cursor& at = progress.first;
    constexpr bool stages_terms = side == Side::scores && Config::stages_terms;
    constexpr bool tells = side == Side::scores && Loop::Ahead::told_bytes > 0;
    uint2 told{};  // asked for before the wait
    if constexpr (tells) told = Loop::Ahead::to_tell(argument.params.forward, work.tiles, position);
    ring.wait_empty(at);
    if constexpr (tells) ptx::st_shared_v2(loop.told(at.stage()), told.x, told.y);
    if constexpr (stages_terms) {
      ring.expect(at, Tile::bytes + Loop::rows_bytes + Loop::Terms::Tile::copied);
      const TilePoint where{m_block * Config::block_m, work.n_block * Config::block_n, work.seqlen.diagonal()};
      typename Config::variant(argument.params.forward, work.batch, head)
          .template put<Config::block_m, Config::block_n>(loop.staged(at.stage()), where, argument.scores,
                                                          ring.full(at.stage()));
    } else {
      ring.expect(at, Tile::bytes + Loop::rows_bytes);
    }
    load_rows<Config>(to, map, ring.full(at.stage()), m_block * Config::block_m, work.queries(head));
    int own = Loop::rows_bytes;  // bytes that are the sequence's own; another's may follow in memory
    if (Config::varlen) {
      own = min_of(own, round_up(work.seqlen.q - m_block * Config::block_m, aligned_rows) * int(sizeof(float)));
      const float* const padding = side == Side::scores ? argument.params.row_lse : argument.params.row_delta;
      if (own < Loop::rows_bytes) {
        ptx::cp_async_bulk(to_numbers + own, padding - Config::block_m, Loop::rows_bytes - own, ring.full(at.stage()));
      }
    }
    ptx::cp_async_bulk(to_numbers, numbers, own, ring.full(at.stage()));
    at.advance();
  }
};

// What is held of a warpgroup's scores until dS is made of it. Operands of products are packed. What dP - delta is
// multiplied by is float32 if `exact`, since it would be rounded a second time as dS; else it is packed, too.
template <class Config, int cols, bool exact>
struct Held {
  using Variant = typename Config::variant;
  using element = typename Config::element;
  // Whether packed factors of dP - delta are something else than weights.
  static constexpr bool own_factors = !exact && (Variant::bends || Variant::scales);
  using Operand = tile::Operand<cols>;
  using Factors = typename Choose<exact, tile::Accumulator<1, cols>, Operand>::type;
  using Rests = tile::Operand<Variant::holds ? cols : 0>;

  Operand weights;  // what dout is multiplied by: P, unless a term scales it
  typename Choose<exact || own_factors, Factors, tile::Operand<0>>::type own;  // what dP - delta is multiplied by
  Rests rests;  // what is multiplied to dS once terms have had their gradients

  const Factors& ds_factors() const {
    if constexpr (exact || own_factors)
      return own;
    else
      return weights;
  }

  void put(int, int i, int j, const ScorePair& pair) {
    const int s = j / 2, x = 2 * (j % 2) + i;
    weights.x[s][x] = ptx::cvt_rn_x2<element>(pair.weight[0], pair.weight[1]);
    if constexpr (exact) {
      own.x[0][j][2 * i] = pair.ds_factor[0];
      own.x[0][j][2 * i + 1] = pair.ds_factor[1];
    }
    if constexpr (own_factors) own.x[s][x] = ptx::cvt_rn_x2<element>(pair.ds_factor[0], pair.ds_factor[1]);
    if constexpr (Variant::holds) rests.x[s][x] = ptx::cvt_rn_x2<element>(pair.rest[0], pair.rest[1]);
  }
};

// Whether the one-pass kernel holds exact factors. They take registers, which what terms load ahead needs, and, in
// tiles of 128 queries, any term and, in deterministic kernels, the thread that adds up dq.
template <class Config>
constexpr bool one_pass_exact =
    Config::block_m == 128 ? Config::variant::empty && !Config::deterministic : !Config::variant::loads;

// The pair (i, j) of what is held, packed or not.
template <class element, int cols>
inline float2 pair_of(const tile::Operand<cols>& operand, int i, int j) {
  return ptx::cvt_f32_x2<element>(operand.x[j / 2][2 * (j % 2) + i]);
}
template <class, int cols>
inline float2 pair_of(const tile::Accumulator<1, cols>& held, int i, int j) {
  return {held.x[0][j][2 * i], held.x[0][j][2 * i + 1]};
}

// What is done with a pair that is held: nothing.
struct HeldOnly {
  void operator()(int, int) const {}
};

// held ← what is held of scores, weights times `Kept::unit`. In a `boundary` tile not every query sees every key.
// Calls each(i, j) when pair (i, j) is there.
template <class Config, bool exact, class Place, int cols, class Numbers, class Loads = LoadedNow,
          class Each = HeldOnly>
inline void hold_probabilities(Held<Config, cols, exact>& held, tile::Accumulator<1, cols>& s, const Place& place,
                               const Kept<Config, 1, cols>& kept, const Numbers& lse, bool boundary,
                               const Loads& loads = {}, const Each& each = {}) {
  mask_unshaped<Config>(s, place, boundary);
  probabilities<Config>(
      s, place, AllKept{}, lse, boundary,
      [&](int t, int i, int j, const ScorePair& pair) {
        held.put(t, i, j, pair);
        u32& weights = held.weights.x[j / 2][2 * (j % 2) + i];
        weights = kept.template weighed<typename Config::element>(weights, i, j);
        each(i, j);
      },
      loads);
}

// ds ← the gradients of scores, of which `ds_factors` and `rests` are held. `s` are the scores that these were made of,
// or, where no term reads them, any numbers.
template <class Config, bool for_terms, class Factors, class Rests, class Place, int cols, class Numbers>
inline void gradients_of_scores(tile::Operand<cols>& ds, const Factors& ds_factors, const Rests& rests,
                                const tile::Accumulator<1, cols>& s, const tile::Accumulator<1, cols>& dp,
                                const Place& place, const Kept<Config, 1, cols>& kept, const Numbers& delta) {
  using element = typename Config::element;
  gradients<Config, for_terms>(
      dp, place, kept, delta, [&](int, int i, int j) { return pair_of<element>(s, i, j); },
      [&](int, int i, int j) { return pair_of<element>(ds_factors, i, j); },
      [&](int, int i, int j) { return pair_of<element>(rests, i, j); },
      [&](int, int i, int j, float low, float high) {
        ds.x[j / 2][2 * (j % 2) + i] = ptx::cvt_rn_x2<element>(low, high);
      });
}

// Rows first_row to first_row + 63 of a tile of shared memory ← the warpgroup's operand.
template <class Tile, int cols>
inline void store_transposed(const Tile& to, const tile::Operand<cols>& from, int first_row) {
  const u32 lane = tile::lane();
  const u32 address = to.address(first_row + int(threadIdx.x / 32 % 4) * 16 + lane % 16, lane / 16);
#pragma unroll
  for (int step = 0; step < cols / 16; ++step) ptx::stmatrix_x4(Tile::step_chunks(address, step), from.x[step]);
}

// dk or dv ← factor · a warpgroup's accumulator, whose rows are keys; the warp's first is first_key. Rows past the live
// length get zeros, whatever dout holds.
template <class Config, bool of_values, int cols>
inline void write_keys(const BackwardParams& backward, const BackwardWork<Config>& work,
                       const tile::Accumulator<1, cols>& from, int first_key) {
  constexpr int valid_cols = of_values ? Config::head_dim_v : Config::head_dim;
  constexpr float unit = Kept<Config, 1, 16>::unit;  // which weights have been multiplied by
  const float factor =
      of_values ? Config::variant::gain(backward.forward.terms) * (1 / unit) : backward.forward.softmax_scale;
  const Strides& strides = of_values ? backward.dv_strides : backward.dk_strides;
  void* const gradient = of_values ? backward.dv : backward.dk;
  NotFinite<f32> not_finite;
  typename Config::element* const rows = static_cast<typename Config::element*>(gradient) + work.batch * strides.batch +
                                         work.head * strides.head + i64(work.seqlen.k_first_row) * strides.seqlen;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_key + tile::fragment_row(0, i);
    write_row<Config::store_bytes, valid_cols>(rows + row * strides.seqlen, strides.dim, row < work.key_rows, from, 0,
                                               i, row < work.seqlen.k ? factor : 0.0f, not_finite);
  }
  if (unlikely(not_finite.found())) *backward.not_finite = 1;
}

}  // namespace attention
