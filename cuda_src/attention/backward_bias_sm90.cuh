// attention: the gradient of a bias that sequences or heads share, with wgmma, for sm_90. A thread block keeps a tile
// of it in registers, 128 queries by some chunks of 64 keys, while it goes over all that share the tile, whose scores,
// and gradients of these, it computes once more. So nothing is added up in memory, and each element is stored once,
// whether it is seen or not: the gradient is the same bits in every run, and need not be 0 first.
//
// The main kernel, whose dS differs by what is multiplied to it behind the bias, knows nothing of it.
#pragma once

#include "attention/backward_params.cuh"
#include "attention/bias.cuh"
#include "attention/block_range.cuh"
#include "attention/scoring.cuh"
#include "core/math.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/shared.cuh"
#include "tile/accumulator.cuh"
#include "tile/gemm_sm90.cuh"
#include "tile/pipeline.cuh"
#include "tile/shared.cuh"
#include "tile/tensor_sm90.cuh"
#include "tile/turn.cuh"

namespace attention {

// A score term without its derivative, by which a bias behind it is not to be multiplied, and without its gradient.
template <class Own>
struct Underived : Constant<Own> {
  using Constant<Own>::Constant;
  static constexpr bool bends = false, gives_slope = false, wild = false;

  float dscore(float, const Point&) const { return 1.0f; }
};

template <class Term, class Rest>
struct Prepended;
template <class Term, class... Rest>
struct Prepended<Term, Variant<Rest...>> {
  using type = Variant<Term, Rest...>;
};

// Of a variant that has a bias apart: the bias; the variant where the derivatives of the terms behind the bias, and no
// others, are multiplied to P; and whether other terms load, too.
template <class Of>
struct Apart;
template <bool first, class First, class... Rest>
struct ApartFrom;
template <class First, class... Rest>
struct Apart<Variant<First, Rest...>> : ApartFrom<First::apart, First, Rest...> {};

template <class First, class... Rest>
struct ApartFrom<false, First, Rest...> {
  using Behind = Apart<Variant<Rest...>>;
  using Bias = typename Behind::Bias;
  using type = typename Prepended<Underived<First>, typename Behind::type>::type;
  static constexpr bool others_load = First::loads || Behind::others_load;

  static const Bias& bias_of(const type& variant) { return Behind::bias_of(variant.others); }
};

template <class First, class... Rest>
struct ApartFrom<true, First, Rest...> {
  using Bias = First;
  using type = Variant<First, Constant<Rest>...>;
  static constexpr bool others_load = Variant<Rest...>::loads;

  static const Bias& bias_of(const type& variant) { return variant.term; }
};

// The main kernel's Config with the tiles and the variant of this one.
template <class Main>
struct BiasConfig : Main {
  static constexpr int block_m = 128, block_n = 64 * Main::bias_chunks;
  using variant = typename Apart<typename Main::variant>::type;
};

// Scores of which none is masked, since dS is, where a tile is not seen whole.
template <class Config>
struct UnmaskedPlace : Place<Config> {
  struct Row : QueryRow<Config> {
    bool sees(int) const { return true; }
  };

  Row row(int t, int i) const { return {Place<Config>::row(t, i)}; }
};

// A tile of the gradient, and who shares it.
template <class Config>
struct BiasTile {
  int m_block, n_block;
  int head, head_end, batch, batch_end;
  bool seen, boundary;  // whether some query sees a key of the tile, and whether not all see all

  // Tiles of a head follow each other, so that the blocks that run side by side read the same rows.
  static BiasTile find(const Params& params, const BiasData& data, int unit) {
    const int m_blocks = ceil_div(params.seqlen_q, Config::block_m);
    const int n_blocks = ceil_div(params.seqlen_k, Config::block_n);
    BiasTile tile;
    tile.m_block = unit % m_blocks;
    tile.n_block = unit / m_blocks % n_blocks;
    const int outer = unit / m_blocks / n_blocks;
    const int heads = data.dhead_stride == 0 ? 1 : params.num_heads_q;
    tile.head = outer % heads;
    tile.batch = outer / heads;
    tile.head_end = heads == 1 ? params.num_heads_q : tile.head + 1;
    tile.batch_end = data.dbatch_stride == 0 ? params.batch : tile.batch + 1;
    const BlockRange range = block_range<Config>(params, dense_seqlen(params), tile.m_block);
    tile.seen = range.contains(tile.n_block);
    tile.boundary = range.is_boundary(tile.n_block);
    return tile;
  }

  // How many tiles there are.
  static int count(const Params& params, const BiasData& data) {
    const int heads = data.dhead_stride == 0 ? 1 : params.num_heads_q;
    const int sequences = data.dbatch_stride == 0 ? 1 : params.batch;
    return ceil_div(params.seqlen_q, Config::block_m) * ceil_div(params.seqlen_k, Config::block_n) * heads * sequences;
  }

  // Calls step(batch, head) for each that shares the tile.
  template <class Step>
  void for_each(Step&& step) const {
#pragma unroll 1
    for (int b = batch; b < batch_end; ++b) {
#pragma unroll 1
      for (int h = head; h < head_end; ++h) step(b, h);
    }
  }
};

template <class Main>
struct BiasGradientSm90 {
  using Config = BiasConfig<Main>;
  static constexpr int consumers = 2, chunks = Main::bias_chunks, chunk = 64;
  static_assert(Config::block_m == 64 * consumers && Main::block_m == 64, "a box of q's map is what a consumer owns");
  static_assert(Config::num_threads == 128 * (1 + consumers), "a warpgroup loads, the others compute");
  static_assert(!Config::varlen, "packed sequences share no tiles");

  using element = typename Config::element;
  using Variant = typename Config::variant;
  using Q = tile::SharedTile<element, 64, Config::tile_head_dim>;  // one for each consumer
  using Dout = tile::SharedTile<element, 64, Config::tile_head_dim_v>;
  using K = tile::SharedTile<element, chunk, Config::tile_head_dim>;
  using V = tile::SharedTile<element, chunk, Config::tile_head_dim_v>;

  using Scores = tile::Accumulator<1, chunk>;
  // Consumers take turns in giving the tensor cores S and dP to do.
  using Turn = tile::Turn<consumers>;

  // What the variant loads is the same for all that share the tile, if the bias alone loads: it is loaded once.
  static constexpr bool loads_once = !Apart<typename Main::variant>::others_load;

  // All chunks of keys of one that shares a tile have stages, or of several in turn: so which stage a chunk has is
  // known when this compiles, and keys arrive long before they are wanted.
  static constexpr int stages = 2, rounds = Main::bias_rounds;
  using Ring = tile::Ring<stages>;
  using KeyRing = tile::Ring<rounds>;

  struct Shared {
    typename Q::Storage q[stages][consumers];
    typename Dout::Storage dout[stages][consumers];
    typename K::Storage k[rounds][chunks];
    typename V::Storage v[rounds][chunks];
    typename Ring::Storage queries, gradients;
    typename KeyRing::Storage keys[chunks], values[chunks];
  };
  static constexpr int smem_bytes = sizeof(Shared);

  u32 smem;

  Q q(u32 stage, int consumer) const {
    return {smem + tile::offset<&Shared::q> + (stage * consumers + consumer) * Q::bytes};
  }
  Dout dout(u32 stage, int consumer) const {
    return {smem + tile::offset<&Shared::dout> + (stage * consumers + consumer) * Dout::bytes};
  }
  K k(u32 round, int c) const { return {smem + tile::offset<&Shared::k> + (round * chunks + c) * K::bytes}; }
  V v(u32 round, int c) const { return {smem + tile::offset<&Shared::v> + (round * chunks + c) * V::bytes}; }
  Ring queries() const { return {smem + tile::offset<&Shared::queries>}; }
  Ring gradients() const { return {smem + tile::offset<&Shared::gradients>}; }
  KeyRing keys(int c) const { return {smem + tile::offset<&Shared::keys> + c * KeyRing::bytes}; }
  KeyRing values(int c) const { return {smem + tile::offset<&Shared::values> + c * KeyRing::bytes}; }

  void init() const {
    constexpr int arrivals = 4 * consumers * tile::warp_arrivals;
    queries().init(arrivals);
    gradients().init(arrivals);
    for (int c = 0; c < chunks; ++c) {
      keys(c).init(arrivals);
      values(c).init(arrivals);
    }
    ptx::fence_mbarrier_init();
  }

  static const BiasData& data(const Params& params) {
    return Main::variant::template data_of<typename Apart<typename Main::variant>::Bias>(params.terms);
  }

  using Tile = BiasTile<Config>;

  // Called by one thread, which loads for each that shares a tile its queries, once, and chunk after chunk of keys.
  void load(const BackwardArgument& argument) const {
    const Params& params = argument.params.forward;
    typename Ring::Cursor at_queries;
    const int units = Tile::count(params, data(params));
#pragma unroll 1
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
      const Tile tile = Tile::find(params, data(params), unit);
      if (!tile.seen) continue;
      tile.for_each([&](int batch, int head) {
        const int row = tile.m_block * Config::block_m, head_k = head / params.qheads_per_khead;
        load_queries(
            queries(), at_queries, [&](int w) { return q(at_queries.stage(), w); }, argument.q, row, head, batch);
#pragma unroll 1
        for (int c = 0; c < chunks; ++c) {
          const typename KeyRing::Cursor at{at_queries.count};
          const int key = tile.n_block * Config::block_n + c * chunk;
          load_keys(keys(c), at, k(at.stage(), c), argument.k, key, head_k, batch);
          if (c == 0) {
            load_queries(
                gradients(), at_queries, [&](int w) { return dout(at_queries.stage(), w); }, argument.dout, row, head,
                batch);
          }
          load_keys(values(c), at, v(at.stage(), c), argument.v, key, head_k, batch);
        }
        at_queries.advance();
      });
    }
  }

  // Rows past the end become zeros.
  template <class Tile>
  static void load_keys(const KeyRing& ring, const typename KeyRing::Cursor& at, const Tile& to,
                        const ptx::TensorMap& map, int row, int head, int batch) {
    ring.wait_empty(at);
    ring.expect(at, Tile::bytes);
    tile::load(to, map, ring.full(at.stage()), row, head, batch);
  }

  template <class Tiles>
  static void load_queries(const Ring& ring, const typename Ring::Cursor& at, Tiles&& tiles, const ptx::TensorMap& map,
                           int row, int head, int batch) {
    ring.wait_empty(at);
    ring.expect(at, consumers * decltype(tiles(0))::bytes);
#pragma unroll
    for (int w = 0; w < consumers; ++w) tile::load(tiles(w), map, ring.full(at.stage()), row + 64 * w, head, batch);
  }

  // Called by warpgroup `consumer` of the consumers, which computes 64 rows of each tile. What a warp has to know of
  // the tile is in `tile`, in shared memory, and read where it is needed, since sums leave no registers.
  void consume(const BackwardParams& backward, Tile& tile, int consumer) const {
    const Params& params = backward.forward;
    const Turn turn(consumer);
    typename Ring::Cursor at_queries;
    const int units = Tile::count(params, data(params));
#pragma unroll 1
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
      __syncwarp();  // all lanes have read what the tile before was
      if (tile::lane() == 0) tile = Tile::find(params, data(params), unit);
      __syncwarp();
      const int first_row = tile.m_block * Config::block_m + 64 * consumer + int(threadIdx.x / 32 % 4) * 16;
      const int first_key = tile.n_block * Config::block_n;
      const Seqlen seqlen = dense_seqlen(params);
      const auto place = [&](int batch, int head, int c) {
        return Place<Config>{params, seqlen, batch, head, first_row, first_key + c * chunk};
      };
      Scores sums[chunks];
      LoadedAhead<Variant, Place<Config>, 1, chunk> ahead[loads_once ? chunks : 1];
#pragma unroll
      for (int c = 0; c < chunks; ++c) {
        sums[c].zero();
        if (loads_once && tile.seen) {
          ahead[c].load(Variant(params, tile.batch, tile.head), place(tile.batch, tile.head, c));
          ahead[c].arrange();
        }
      }
      if (tile.seen) {
        tile.for_each([&](int batch, int head) {
          RowNumbers<1> lse, delta;
          const i64 workspace_row = (i64(batch) * params.num_heads_q + head) * backward.workspace_rows;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int row = first_row + tile::fragment_row(0, i);
            lse.x[0][i] = row < seqlen.q ? backward.row_lse[workspace_row + row] : infinity;
            delta.x[0][i] = row < seqlen.q ? backward.row_delta[workspace_row + row] : 0.0f;
          }
          queries().wait_full(at_queries);
          const typename KeyRing::Cursor at_keys{at_queries.count};
#pragma unroll
          for (int c = 0; c < chunks; ++c) {
            auto& loaded = ahead[loads_once ? c : 0];
            const auto where = [&] { return place(batch, head, c); };
            if constexpr (!loads_once) loaded.load(Variant(params, batch, head), where());
            Scores s, dp;
            keys(c).wait_full(at_keys);
            turn.take();
            warpgroup::gemm_abt<Config::head_dim>(s, q(at_queries.stage(), consumer), k(at_keys.stage(), c));
            if (c == 0) gradients().wait_full(at_queries);
            values(c).wait_full(at_keys);
            warpgroup::gemm_abt<Config::head_dim_v>(dp, dout(at_queries.stage(), consumer), v(at_keys.stage(), c));
            turn.pass(1 - consumer);
            Kept<Config, 1, chunk> kept;
            kept.find(where);  // while the products run
            if constexpr (!loads_once) loaded.arrange();
            warpgroup::wait<1>(s);
            keys(c).release_warp(at_keys);
            if (c == chunks - 1) queries().release_warp(at_queries);
            const UnmaskedPlace<Config> at{where()};
            probabilities<Config>(
                s, at, kept, lse, tile.boundary,
                [&](int, int i, int j, const ScorePair& pair) {
                  s.x[0][j][2 * i] = pair.ds_factor[0];
                  s.x[0][j][2 * i + 1] = pair.ds_factor[1];
                },
                loaded);
            warpgroup::wait<0>(dp);
            values(c).release_warp(at_keys);
            if (c == chunks - 1) gradients().release_warp(at_queries);
            attention::gradients<Config, false>(
                dp, at, kept, delta, [](int, int, int) { return float2{}; },
                [&](int, int i, int j) { return float2{s.x[0][j][2 * i], s.x[0][j][2 * i + 1]}; },
                [](int, int, int) { return float2{1.0f, 1.0f}; },
                [&](int, int i, int j, float low, float high) {
                  s.x[0][j][2 * i] = low;
                  s.x[0][j][2 * i + 1] = high;
                });
            if (Variant::hides || tile.boundary) clear_unseen(s, Variant(params, batch, head), where(), loaded);
            sums[c].add(s);
          }
          at_queries.advance();
        });
      }
      const Variant variant(params, tile.batch, tile.head);
#pragma unroll
      for (int c = 0; c < chunks; ++c) {
        store(sums[c], Apart<typename Main::variant>::bias_of(variant), seqlen, first_row, first_key + c * chunk);
      }
    }
  }

  // dS of keys that a query does not see ← 0, whatever it is.
  template <class Loads>
  static void clear_unseen(Scores& ds, const Variant& variant, const Place<Config>& place, const Loads& loads) {
    for_each_pair<true, 1, chunk>(place, [&](const auto& row, int t, int i, int j) {
      const auto& loaded = loads.of(variant, row, t, i, j);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Point at = row.at(8 * j + e);
        if (!(at.live && row.sees(8 * j + e) && variant.keeps(at, loaded, e))) ds.x[t][j][2 * i + e] = 0.0f;
      }
    });
  }

  // Rows of the gradient from first_row on and keys from first_key on ← a warp's sums.
  template <class Bias>
  static void store(const Scores& sums, const Bias& bias, const Seqlen& seqlen, int first_row, int first_key) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = first_row + tile::fragment_row(0, i), key = first_key + tile::fragment_col();
      if (query >= seqlen.q) continue;
      float* const row = reinterpret_cast<float*>(bias.dbias + i64(query) * bias.dquery_stride) + key;
#pragma unroll
      for (int j = 0; j < Scores::n_tiles; ++j) {
        const float low = sums.x[0][j][2 * i], high = sums.x[0][j][2 * i + 1];
        if constexpr (Bias::Array::paired) {  // then there is an even number of keys
          if (key + 8 * j < seqlen.k) *reinterpret_cast<float2*>(row + 8 * j) = {low, high};
        } else {
          if (key + 8 * j < seqlen.k) row[8 * j] = low;
          if (key + 8 * j + 1 < seqlen.k) row[8 * j + 1] = high;
        }
      }
    }
  }
};

template <class Config>
inline void backward_bias_sm90(const BackwardArgument& argument) {
  using Mainloop = BiasGradientSm90<Config>;
  static_assert(Config::bias_smem_bytes == Mainloop::smem_bytes, "Config and the tiles disagree on shared memory");
  extern __shared__ __align__(1024) char dynamic_smem[];
  __shared__ typename Mainloop::Tile tiles[4 * Mainloop::consumers];
  const Mainloop mainloop{ptx::shared_address(dynamic_smem)};

  if (threadIdx.x == 0) mainloop.init();
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<24>();
    if (threadIdx.x == 0) mainloop.load(argument);
  } else {
    ptx::setmaxnreg_inc<240>();
    mainloop.consume(argument.params, tiles[threadIdx.x / 32 - 4], warpgroup - 1);
  }
}

}  // namespace attention
