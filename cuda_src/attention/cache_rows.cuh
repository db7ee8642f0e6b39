// attention: where the rows of a sequence lie in a cache: side by side, or in pages that a table names.
#pragma once

#include "attention/cache_params.cuh"
#include "attention/params.cuh"
#include "attention/row_source.cuh"
#include "core/math.cuh"
#include "core/types.cuh"

namespace attention {

// The addresses of some rows of a sequence.
template <class element, int count>
struct FoundRows {
  const element* pointers[count];

  const element* operator[](int index) const { return pointers[index]; }
};

// The rows of a sequence in one head of pages, as a source for attention/row_source.cuh. What the table holds behind
// the last live row is not looked at, and a page that does not exist counts as the nearest that does. From each
// multiple of page_rows on, a power of 2, so many rows lie in one page: then the table is looked at once for all of
// them.
template <class element, int page_rows>
struct PagedRows {
  const element* pointer;  // the head's part of page 0
  const Strides& strides;
  int length;
  const CacheParams& cache;
  int batch;
  int first_row;  // where in the sequence's pages row 0 is

  template <int count, int step>
  FoundRows<element, count> find(int row) const {
    static_assert(page_rows % step == 0 || step % page_rows == 0, "both are powers of 2");
    FoundRows<element, count> found;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const bool looked_up = i * step % page_rows != 0;
      found.pointers[i] = looked_up ? found.pointers[max_of(0, i - 1)] + step * strides.seqlen : at(row + i * step);
    }
    return found;
  }

  const element* at(int row) const {
    const CacheSlot slot = paged(cache, first_row + max_of(0, min_of(row, length - 1)));
    const i64 entry = batch * cache.block_table_batch_stride + slot.cache * cache.block_table_page_stride;
    const int page = clamp(length > 0 ? cache.block_table[entry] : 0, 0, cache.num_caches - 1);
    return pointer + page * strides.batch + slot.row * strides.seqlen;
  }
};

}  // namespace attention
