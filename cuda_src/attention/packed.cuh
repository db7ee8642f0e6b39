// attention: how packed sequences are found. cu_seqlens may hold anything: each offset is clamped to the packed array
// and counts as the largest offset up to it. So sequences follow each other, no row is in two sequences, and no address
// outside the arrays is formed.
#pragma once

#include "attention/params.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// The number of a sequence's first unit. A unit is `rows` rows or, where units are `pairs`, twice as many. The sequence
// begins with row `offset`, and `rank` counts the sequences before it: either all of them or those that have rows. The
// units up to the next sequence's first are always enough for the rows of this one, so that the host needs no lengths.
template <int rows>
constexpr int first_packed_unit(int offset, int rank, bool pairs = false) {
  return int(u32(offset) / rows >> pairs) + rank;
}

struct PackedSequence {
  int batch;  // the index of the sequence; negative: there is none
  int q_begin, q_end, k_begin, k_end;
};

// The scan takes a warp through cu_seqlens, to find the sequences of units that never decrease from one call to the
// next. It lives in shared memory, since the warp may have few registers.
struct PackedScan {
  int first;         // how many offsets the scan has passed
  int q_max, k_max;  // the largest of the offsets that the scan has passed
  PackedSequence found;

  // One thread calls this, and a barrier has to follow.
  void init() {
    first = q_max = k_max = 0;
    found.batch = -1;
  }

  // Says whether a unit has the sequence that was found last. The unit must not be before the one of that call.
  template <int rows>
  constexpr bool holds(int unit, bool pairs) const {
    return found.batch >= 0 && unit < first_packed_unit<rows>(found.q_end, found.batch + 1, pairs);
  }

  // Finds the sequence of a unit. A whole warp calls this; it loads `groups` times 32 offsets together.
  template <int rows, int groups>
  void find(const Params& params, int unit, bool pairs) {
    PackedScan at{first, q_max, k_max, {-1, 0, 0, 0, 0}};
    at.advance<rows, groups>(params, unit, pairs);
    __syncwarp();  // all lanes have read the scan
    if (tile::lane() == 0) *this = at;
    __syncwarp();
  }

 private:
  template <int rows, int groups>
  void advance(const Params& params, int unit, bool pairs) {
#pragma unroll 1
    while (first <= params.batch) {
      int q[groups] = {}, k[groups] = {};
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        const int b = first + 32 * g + int(tile::lane());
        if (b <= params.batch) {
          q[g] = clamp(params.cu_seqlens_q[b * params.cu_seqlens_q_stride], 0, params.seqlen_q);
          k[g] = clamp(params.cu_seqlens_k[b * params.cu_seqlens_k_stride], 0, params.seqlen_k);
        }
      }
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        const int group_max = max_of(q_max, __reduce_max_sync(0xffffffffu, q[g]));
        if (first_packed_unit<rows>(group_max, min_of(first + 31, params.batch), pairs) > unit) {
          return within<rows>(unit, pairs, q[g], k[g]);
        }
        q_max = group_max;
        k_max = max_of(k_max, __reduce_max_sync(0xffffffffu, k[g]));
        first += 32;
      }
    }
  }

  // Finds the sequence of a unit where it ends with one of the 32 offsets from `first` on. Each lane has one of them.
  template <int rows>
  void within(int unit, bool pairs, int q, int k) {
    q = max_of(q_max, prefix_max(q));
    k = max_of(k_max, prefix_max(k));
    const bool beyond = first_packed_unit<rows>(q, first + int(tile::lane()), pairs) > unit;
    const int end = __ffs(__ballot_sync(0xffffffffu, beyond)) - 1;
    found.batch = first + end - 1;
    const int q_before = __shfl_sync(0xffffffffu, q, end - 1), k_before = __shfl_sync(0xffffffffu, k, end - 1);
    found.q_begin = end == 0 ? q_max : q_before;
    found.k_begin = end == 0 ? k_max : k_before;
    found.q_end = __shfl_sync(0xffffffffu, q, end);
    found.k_end = __shfl_sync(0xffffffffu, k, end);
  }

  static int prefix_max(int x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      x = max_of(x, __shfl_up_sync(0xffffffffu, x, step));  // a lane that has none before it gets its own
    }
    return x;
  }
};

// What an offset counts as, and how many sequences before it have rows. The backward's first kernel writes one of these
// for every offset, and the other kernels read them.
struct alignas(8) PackedOffset {
  i32 row, rank;
};

// How many keys of a packed sequence are live; `keys` is how many it has.
constexpr int live_keys(const Params& params, int batch, int keys) {
  return params.seqused_k ? clamp(params.seqused_k[batch * params.seqused_k_stride], 0, keys) : keys;
}

}  // namespace attention
