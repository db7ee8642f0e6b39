// attention: where the rows of a sequence lie in a cache: side by side, or in pages that a table names.
#pragma once

#include "attention/cache_params.cuh"
#include "attention/params.cuh"
#include "attention/row_source.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/opaque.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// The addresses of some rows of a sequence, each from byte `byte` on.
template <class element, int count>
struct FoundRows {
  int byte;
  const element* pointers[count];

  const char* operator[](int index) const { return reinterpret_cast<const char*>(pointers[index]) + byte; }
};

// The same, by the slots of the rows: an address is then one product and sum.
template <int count>
struct SlottedRows {
  const char* pointer;  // that byte of slot 0
  int slot_bytes;
  int slots[count];

  const char* operator[](int index) const { return pointer + i64(slots[index]) * slot_bytes; }
};

// The pages of `rows` rows of a sequence: lane i of a warp holds those of page_rows rows from row i · page_rows on and,
// where there are more, from 32 · page_rows rows behind. A single page all lanes hold. They are as the table has them:
// whoever clamped them at once would wait for them.
template <int rows, int page_rows>
struct PagePlaces {
  static constexpr int entries = ceil_div(rows, page_rows), count = ceil_div(entries, 32);
  int pages[count];
  int first_rows[count];  // of the page, of those rows

  // Of what lanes have for their pages, the number for the page of row `before` + `own`, of which `before` is known to
  // the compiler, and 32 a multiple of what `own` is less than. All lanes call this.
  static int of(const int (&numbers)[count], int before, int own) {
    if constexpr (entries == 1) return numbers[0];
    return __shfl_sync(0xffffffffu, numbers[before / page_rows / 32], (before + own) / page_rows % 32);
  }
};

// The rows of a sequence in one head of pages, as a source for attention/row_source.cuh. What the table holds behind
// the last live row is not looked at, and a page that does not exist counts as the nearest that does. From each
// multiple of page_rows on, a power of 2, so many rows lie in one page: then the table is looked at once for all of
// them. A warp looks a block of rows up together (`look_up`), if it likes long before it asks where they are. Where
// `slotted`, rows have slots: see CacheParams.
template <class element, int page_rows, bool slotted>
struct PagedRows {
  const element* pointer;  // the head's part of page 0
  const Strides& strides;
  int slot_bytes;
  int length;
  const CacheParams& cache;
  const i32* table;  // the sequence's pages
  int first_row;     // where in them row 0 is

  // The rows of a block that begins at `base`, whose pages are known.
  template <int rows>
  struct Placed {
    using Places = PagePlaces<rows, page_rows>;

    const PagedRows& source;
    const Strides& strides;
    int length;
    const Places& places;
    int base;

    template <int count, int step>
    auto find(int row, int byte) const {
      static_assert(page_rows % step == 0 || step % page_rows == 0, "both are powers of 2");
      static_assert(32 % step == 0 && (count - 1) * step < rows, "the first of the rows is one of `step`");
      const int own = row - base, within = own % page_rows;
      int pages[Places::count];
#pragma unroll
      for (int i = 0; i < Places::count; ++i) pages[i] = source.existing(places.pages[i]);
      if constexpr (slotted) {
        const CacheParams& cache = source.cache;
        int slots[Places::count];
#pragma unroll
        for (int i = 0; i < Places::count; ++i) {
          slots[i] = pages[i] * cache.page_slots + places.first_rows[i] * cache.row_slots;
        }
        const char* const first = reinterpret_cast<const char*>(source.pointer) + byte;
        SlottedRows<count> found{ptx::opaque(first), source.slot_bytes};  // else the byte is added for each row
#pragma unroll
        for (int i = 0; i < count; ++i) {
          found.slots[i] = is_known<step>(i) ? found.slots[max_of(0, i - 1)] + step * cache.row_slots
                                             : Places::of(slots, i * step, own) + within * cache.row_slots;
        }
        return found;
      } else {
        FoundRows<element, count> found{byte};
#pragma unroll
        for (int i = 0; i < count; ++i) {
          found.pointers[i] = is_known<step>(i) ? found.pointers[max_of(0, i - 1)] + step * strides.seqlen
                                                : source.at(Places::of(pages, i * step, own),
                                                            Places::of(places.first_rows, i * step, own) + within);
        }
        return found;
      }
    }

    // Whether the row that is i · step behind is in the page of the one before it.
    template <int step>
    static constexpr bool is_known(int i) {
      return i * step % page_rows != 0;
    }
  };

  // The pages of rows from `row` on, a multiple of page_rows unless there is padding; the sequence has some rows. All
  // lanes of a warp call this.
  template <int rows>
  PagePlaces<rows, page_rows> look_up(int row) const {
    using Places = PagePlaces<rows, page_rows>;
    Places places;
#pragma unroll
    for (int i = 0; i < Places::count; ++i) {
      const int entry = Places::entries == 1 ? 0 : 32 * i + int(tile::lane());
      const CachePlace place = place_of(row + min_of(entry, Places::entries - 1) * page_rows);
      places.pages[i] = entry_of(place);
      places.first_rows[i] = place.row;
    }
    return places;
  }

  // The same rows, from `base` on, with what `look_up` has found of them.
  template <int rows>
  Placed<rows> with(const PagePlaces<rows, page_rows>& places, int base) const {
    return {*this, strides, length, places, base};
  }

  const element* at(int row) const {
    const CachePlace place = place_of(row);
    return at(existing(entry_of(place)), place.row);
  }

 private:
  CachePlace place_of(int row) const { return paged(cache, first_row + min_of(row, length - 1)); }

  int entry_of(const CachePlace& place) const { return table[u32(place.cache) * cache.block_table_page_stride]; }

  int existing(int page) const { return clamp(page, 0, cache.num_caches - 1); }

  // A page and a row that exist, so that neither has a sign to be extended.
  const element* at(int page, int row) const { return pointer + u32(page) * strides.batch + u32(row) * strides.seqlen; }
};

}  // namespace attention
