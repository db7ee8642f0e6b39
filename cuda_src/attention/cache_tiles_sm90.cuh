// attention: the tiles that the main loop for sm_90 computes of sequences in caches: how long these are is found out on
// the device, and tensor copies load their keys from where they lie.
#pragma once

#include "attention/cache_params.cuh"
#include "attention/cache_plan.cuh"
#include "attention/cache_tma_params.cuh"
#include "attention/params.cuh"
#include "attention/seqlen.cuh"
#include "attention/taken_tiles.cuh"
#include "attention/work.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/tma.cuh"
#include "tile/accumulator.cuh"
#include "tile/tensor_sm90.cuh"

namespace attention {

template <class Config>
struct CachedLengths {
  static Seqlen dense(const Params& params, int batch) {
    return cached_seqlen<Config>(params, cache_of(params), batch, 0, 0);
  }
  static Seqlen packed(const Params& params, const PackedSequence& sequence) {
    if (sequence.batch < 0) return {0, 0, 0, 0};
    return cached_seqlen<Config>(params, cache_of(params), sequence.batch, sequence.q_begin, sequence.q_end);
  }
};

// Live rows that follow each other in a cache or page: the last `live` of those before row `end`.
struct CachedBox {
  int live, end;
  int head, cache;
};

// The rows from `address` on ← those of a box, and zeros behind them, as many as boxes of the map have. One row at
// least must be live: see MappedRows.
template <class Tile>
inline void load_cached(u32 address, int box_rows, const ptx::TensorMap& map, u32 barrier, const CachedBox& box) {
#pragma unroll
  for (int panel = 0; panel < Tile::panels; ++panel) {
    ptx::cp_async_bulk_tensor_5d(address + panel * Tile::panel_stride, map, barrier, panel * tile::panel_cols<Tile>,
                                 box_rows - box.live, box.head, box.end, box.cache);
  }
}

// The rows of a sequence in one head of a cache.
struct CachedRows {
  int length;     // how many rows are live
  int first_row;  // the row of the cache with which the sequence begins
  int head, cache;
};

// to ← rows from `row` on; rows past the end become zeros.
template <class Config, class Tile>
inline void load_rows(const Tile& to, const ptx::TensorMap& map, u32 barrier, int row, const CachedRows& from) {
  const int live = min_of(from.length - row, Tile::rows);
  load_cached<Tile>(to.base, Tile::rows, map, barrier, {live, from.first_row + row + live, from.head, from.cache});
}

// A lane's box of a tile that is made of those of a whole warp.
template <int box_rows>
struct LaneBox : CachedBox {
  // to ← the boxes of all lanes. A whole warp calls this.
  template <class Tile>
  void load(const Tile& to, const ptx::TensorMap& map, u32 barrier) const {
    const int row = int(tile::lane()) * box_rows;
    if (row < Tile::rows) load_cached<Tile>(to.base + Tile::step_rows(row), box_rows, map, barrier, *this);
  }
};

// The rows of a sequence in one head of pages. A tile is made of boxes of rows that lie in one page, each of which is a
// lane's.
template <class Config>
struct MappedPages {
  static constexpr int box_rows = Config::page_rows;

  int length;  // how many rows are live
  int head, batch;
  const CacheParams& cache;

  // The lane's box of the tile of rows from `row` on. Where none of its rows is live it is the tile's last that has
  // some: so no page is looked for that the sequence does not have, and the tile holds nothing that is not live.
  template <class Tile>
  LaneBox<box_rows> find(int row) const {
    static_assert(Tile::rows % box_rows == 0 && Tile::rows / box_rows <= 32);
    const int first = min_of(row + int(tile::lane()) * box_rows, (length - 1) / box_rows * box_rows);
    const int live = min_of(box_rows, length - first);
    const CachePlace place = cache_place<Config>(cache, batch, first);
    return {{live, place.row + live, head, clamp(place.cache, 0, cache.num_caches - 1)}};
  }
};

// A tile of queries of a sequence in a cache.
template <class Config>
struct MappedCacheWork : Work<Config> {
  using element = typename Config::element;

  int own_cache;  // which of the caches the sequence has, unless they are paged

  // As that of Work.
  void find(const Params& params, PackedScan& scan, int unit, bool second) {
    Work<Config>::template find<2, false, CachedLengths<Config>>(params, scan, unit, second);
    if (Config::page_rows > 0 || tile::lane() != 0) return;
    const CacheParams& cache = cache_of(params);
    own_cache = clamp(cache_place<Config>(cache, this->tile.batch, 0).cache, 0, cache.num_caches - 1);
  }

  auto keys(const Params& params) const {
    const int head = this->key_head(params, this->tile.head);
    if constexpr (Config::page_rows > 0)
      return MappedPages<Config>{this->seqlen.k, head, this->tile.batch, cache_of(params)};
    else
      return CachedRows{this->seqlen.k, this->seqlen.k_first_row, head, own_cache};
  }

  const element* key_row(const Params& params, int key) const {
    return cached(params, params.k, params.k_strides, key);
  }
  const element* value_row(const Params& params, int key) const {
    return cached(params, params.v, params.v_strides, key);
  }

 private:
  const element* cached(const Params& params, const void* pointer, const Strides& strides, int key) const {
    const CacheParams& cache = cache_of(params);
    const CachePlace place = cache_place<Config>(cache, this->tile.batch, this->seqlen.k_first_row + key);
    return static_cast<const element*>(pointer) + clamp(place.cache, 0, cache.num_caches - 1) * strides.batch +
           place.row * strides.seqlen + this->key_head(params, this->tile.head) * strides.head;
  }
};

// What the main loop is given: see GivenTiles.
template <class Config>
struct CachedTiles {
  using Argument = CacheTmaParams;
  using Work = MappedCacheWork<Config>;
  using Cursor = TakingCursor<Argument>;
  using CursorAgain = TrailCursor<Argument>;
  static constexpr int load_lanes = Config::page_rows > 0 ? 32 : 1;
  static constexpr bool finds_empty = true, finds_late = true;
};

}  // namespace attention
