// attention: where the rows of a sequence lie in a cache: side by side, or in pages that a table names.
#pragma once

#include "attention/cache_params.cuh"
#include "attention/params.cuh"
#include "attention/row_source.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// The addresses of some rows of a sequence.
template <class element, int count>
struct FoundRows {
  const element* pointers[count];

  const element* operator[](int index) const { return pointers[index]; }
};

// The pages of `rows` rows of a sequence: lane i of a warp holds those of page_rows rows from row i · page_rows on and,
// where there are more, from 32 · page_rows rows behind. A single page all lanes hold.
template <int rows, int page_rows>
struct PagePlaces {
  static constexpr int entries = ceil_div(rows, page_rows), count = ceil_div(entries, 32);
  int pages[count];

  // The page of row `before` + `own`, of which `before` is known to the compiler, and 32 a multiple of what `own` is
  // less than. All lanes call this.
  int of(int before, int own) const {
    if constexpr (entries == 1) return pages[0];
    return __shfl_sync(0xffffffffu, pages[before / page_rows / 32], (before + own) / page_rows % 32);
  }
};

// The rows of a sequence in one head of pages, as a source for attention/row_source.cuh. What the table holds behind
// the last live row is not looked at, and a page that does not exist counts as the nearest that does. From each
// multiple of page_rows on, a power of 2, so many rows lie in one page: then the table is looked at once for all of
// them. A warp looks a block of rows up together (`look_up`), if it likes long before it asks where they are.
template <class element, int page_rows>
struct PagedRows {
  const element* pointer;  // the head's part of page 0
  const Strides& strides;
  int length;
  const CacheParams& cache;
  int batch;
  int first_row;  // where in the sequence's pages row 0 is

  // The rows of a block that begins at `base`, whose pages are known.
  template <int rows>
  struct Placed {
    const PagedRows& source;
    const Strides& strides;
    int length;
    const PagePlaces<rows, page_rows>& places;
    int base;

    template <int count, int step>
    FoundRows<element, count> find(int row) const {
      static_assert(page_rows % step == 0 || step % page_rows == 0, "both are powers of 2");
      static_assert(32 % step == 0 && (count - 1) * step < rows, "the first of the rows is one of `step`");
      FoundRows<element, count> found;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const bool known = i * step % page_rows != 0;
        found.pointers[i] = known ? found.pointers[max_of(0, i - 1)] + step * strides.seqlen
                                  : source.at(row + i * step, places.of(i * step, row - base));
      }
      return found;
    }
  };

  // The pages of rows from `row` on, a multiple of page_rows unless there is padding. All lanes of a warp call this.
  template <int rows>
  PagePlaces<rows, page_rows> look_up(int row) const {
    using Places = PagePlaces<rows, page_rows>;
    Places places;
#pragma unroll
    for (int i = 0; i < Places::count; ++i) {
      const int entry = Places::entries == 1 ? 0 : 32 * i + int(tile::lane());
      places.pages[i] = page_of(row + min_of(entry, Places::entries - 1) * page_rows);
    }
    return places;
  }

  // The same rows, from `base` on, with what `look_up` has found of them.
  template <int rows>
  Placed<rows> with(const PagePlaces<rows, page_rows>& places, int base) const {
    return {*this, strides, length, places, base};
  }

  const element* at(int row) const { return at(row, page_of(row)); }

 private:
  CacheSlot slot(int row) const { return paged(cache, first_row + max_of(0, min_of(row, length - 1))); }

  int page_of(int row) const {
    const i64 entry = batch * cache.block_table_batch_stride + slot(row).cache * cache.block_table_page_stride;
    return clamp(length > 0 ? cache.block_table[entry] : 0, 0, cache.num_caches - 1);
  }

  const element* at(int row, int page) const { return pointer + page * strides.batch + slot(row).row * strides.seqlen; }
};

}  // namespace attention
