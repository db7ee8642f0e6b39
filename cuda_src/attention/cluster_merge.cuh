// attention: the sums of a row's parts put together where the thread blocks of a cluster share an item: each sends its
// part of row r to block r % size of the cluster, into that block's shared memory.
//
// What is sent completes an mbarrier there. So nobody waits for a whole cluster, no store has to have arrived before
// the next step, and a block ends without a look at the others: it has what it needs when all bytes have come.
//
// A block that is alone executes none of this: its launch has no clusters, and what stores to shared memory of other
// blocks is for those that have.
#pragma once

#include "attention/split_merge.cuh"
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared.cuh"
#include "ptx/thread.cuh"
#include "tile/accumulator.cuh"
#include "tile/shared.cuh"

namespace attention {

// What a block is sent: parts of `rows` rows at most, as a cluster has no more blocks than that.
template <int rows, int cols>
struct Received {
  static_assert(cols % 4 == 0 && rows % 2 == 0, "what is sent lies at multiples of its own size");

  alignas(16) float sums[rows * cols];
  float2 statistics[rows];
  u64 arrival;  // an mbarrier
};

// Where that is, and which of it a block writes or reads. The blocks of a cluster are a power of 2.
template <int rows, int cols>
struct Exchange {
  using Memory = Received<rows, cols>;

  u32 address;  // of this block's Memory
  int rank;     // of this block in its cluster
  int shift;    // logarithm of the size of the cluster

  explicit Exchange(u32 address)
      : address(address), rank(ptx::cluster_ctarank()), shift(31 - __clz(int(ptx::cluster_nctarank()))) {}

  int size() const { return 1 << shift; }
  bool alone() const { return shift == 0; }

  // Which cluster of the grid this is: a division would take time before the first key is asked for.
  int cluster() const { return blockIdx.x >> shift; }

  // Tells the cluster that this block has begun and may be sent something. All threads call this, first of all.
  void arrive() const {
    if (alone()) return;
    if (ptx::tid_x() == 0) {
      ptx::mbarrier_init(arrival(address), 1);
      ptx::fence_mbarrier_init();
    }
    __syncwarp();
    ptx::cluster_arrive_relaxed();
  }

  // Says how many rows there are, and waits until all blocks have arrived. All threads call this next, and meet before
  // they wait for what is sent.
  void expect(int live) const {
    if (alone()) return;
    const int own = (live - rank + size() - 1) >> shift;
    if (ptx::tid_x() == 0 && own > 0) {
      ptx::mbarrier_arrive_expect_tx(arrival(address), own * size() * int(cols * sizeof(float) + sizeof(float2)));
    }
    __syncwarp();
    ptx::cluster_wait();
  }

  // Sends this block's part of a row. A warp calls this.
  template <class element>
  void send(int row, const RowUnion<element>& part, const LaneSums<cols>& sums) const {
    const u32 to = ptx::mapa(address, row & (size() - 1));
#pragma unroll
    for (int c = 0; c < LaneSums<cols>::count; ++c) {
      const int quad = 32 * c + tile::lane();
      const float (&x)[4] = sums.x[c];
      if (quad < LaneSums<cols>::quads) {
        const uint4 words{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
        ptx::st_async_v4(sums_at(to, place(rank, row), quad), words, arrival(to));
      }
    }
    if (tile::lane() == 0) {
      ptx::st_async_v2(statistics_at(to, place(rank, row)), __float_as_uint(part.base), __float_as_uint(part.sum),
                       arrival(to));
    }
  }

  // Waits until all that is expected has come.
  void wait() const {
    while (!ptx::mbarrier_try_wait_parity(arrival(address), 0)) {
    }
  }

  // What has been sent to this block, as split_merge.cuh takes it: a part is a block's.
  float2 statistics(int part, int row) const { return ptx::ld_shared_f32x2(statistics_at(address, place(part, row))); }
  uint4 sums(int part, int row, int quad) const { return ptx::ld_shared_v4(sums_at(address, place(part, row), quad)); }

 private:
  int place(int part, int row) const { return (row & -size()) + part; }
  static u32 sums_at(u32 memory, int place, int quad) {
    return memory + tile::offset<&Memory::sums> + (place * cols + 4 * quad) * int(sizeof(float));
  }
  static u32 statistics_at(u32 memory, int place) {
    return memory + tile::offset<&Memory::statistics> + place * int(sizeof(float2));
  }
  static u32 arrival(u32 memory) { return memory + tile::offset<&Memory::arrival>; }
};

}  // namespace attention
