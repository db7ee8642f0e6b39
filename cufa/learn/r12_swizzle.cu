// Rung 12: swizzled tiles, read by ldmatrix. See r12_swizzle.py.
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"

using element = ELEMENT;
constexpr int warps = 4, threads = 32 * warps;
constexpr int rows = 16 * warps;  // of q: a warp has 16
constexpr int tile_keys = 64;
constexpr int chunks = HEAD_DIM / 8;  // of 16 bytes, in a row

using Tile = uint4[tile_keys][chunks];

// Where a chunk of a row lies in it: the same chunk of eight rows is in eight different places, and fills all banks.
inline int swizzled(int key, int chunk) { return chunk ^ (key & 7); }

// Two tiles of each: one is multiplied while the next one arrives.
struct Smem {
  Tile k[2], v[2];
};

// Begins to copy a tile. No register is on the way: the copy engine writes to shared memory, zeros for keys that are
// not there, while the threads go on.
inline void begin_tile(Tile& tile, const element* from, i64 step, int count) {
  const u32 to = ptx::shared_address(tile);
  const int chunk = threadIdx.x % chunks;
#pragma unroll
  for (int key = threadIdx.x / chunks; key < tile_keys; key += threads / chunks) {
    const bool live = key < count;
    ptx::cp_async<16>(to + 16 * (key * chunks + swizzled(key, chunk)), live ? from + key * step + 8 * chunk : from,
                      16 * live);
  }
}

inline u32 pair_of(const element* row) { return *reinterpret_cast<const u32*>(row); }

// Right operands of two products: 16 columns from `chunk` on of 16 keys from `key` on. Lane l gives the address of a
// row of a matrix of 8 x 8: rows 0 to 7 and 8 to 15 of this chunk and of the next one.
inline void load_k(u32 (&b)[4], u32 tile, int lane, int key, int chunk) {
  const int row = key + lane / 16 * 8 + lane % 8;
  ptx::ldmatrix_x4(b, tile + 16 * (row * chunks + swizzled(row, chunk + lane / 8 % 2)));
}

// The same where keys are what is added up: matrices arrive transposed.
inline void load_v(u32 (&b)[4], u32 tile, int lane, int key, int chunk) {
  const int row = key + lane % 16;
  ptx::ldmatrix_x4_trans(b, tile + 16 * (row * chunks + swizzled(row, chunk + lane / 16)));
}

extern "C" __global__ __launch_bounds__(threads, 3) void attention(const ELEMENT* q, const ELEMENT* k, const ELEMENT* v,
                                                                   ELEMENT* out, int seqlen_q, int seqlen_k, int heads,
                                                                   float scale, bool causal) {
  extern __shared__ __align__(16) char memory[];
  Smem& smem = *reinterpret_cast<Smem*>(memory);
  // Lane (g, t) of a warp has rows g and g + 8 of its 16, in the columns 2 t and 2 t + 1 of every eight.
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int batch = blockIdx.y / heads, head = blockIdx.y % heads, offset = seqlen_k - seqlen_q;
  const int first_row = blockIdx.x * rows, row = first_row + int(threadIdx.x / 32) * 16 + g;
  const i64 step = i64(heads) * HEAD_DIM;
  q += i64(batch) * seqlen_q * step + head * HEAD_DIM;
  out += i64(batch) * seqlen_q * step + head * HEAD_DIM;
  k += i64(batch) * seqlen_k * step + head * HEAD_DIM;
  v += i64(batch) * seqlen_k * step + head * HEAD_DIM;

  u32 a[HEAD_DIM / 16][4];  // q, as the left operand of 16 x 16
#pragma unroll
  for (int s = 0; s < HEAD_DIM / 16; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = row + i % 2 * 8, column = 16 * s + i / 2 * 8 + 2 * t;
      a[s][i] = at < seqlen_q ? pair_of(q + at * step + column) : 0;
    }
  }
  float o[HEAD_DIM / 8][4] = {}, max_score[2] = {-infinity, -infinity}, sum[2] = {};
  const int block_keys = causal ? min(seqlen_k, first_row + rows + offset) : seqlen_k;
  const auto begin = [&](int first, int stage) {
    if (first < block_keys) {
      begin_tile(smem.k[stage], k + first * step, step, seqlen_k - first);
      begin_tile(smem.v[stage], v + first * step, step, seqlen_k - first);
    }
    ptx::cp_async_commit_group();  // empty at the end, so that groups can be counted
  };
  begin(0, 0);
  for (int first = 0, stage = 0; first < block_keys; first += tile_keys, stage ^= 1) {
    begin(first + tile_keys, stage ^ 1);
    ptx::cp_async_wait_group<1>();  // this thread's part of the tile is there
    __syncthreads();                // and that of all others
    const u32 k_tile = ptx::shared_address(smem.k[stage]), v_tile = ptx::shared_address(smem.v[stage]);

    float score[tile_keys / 8][4] = {};
#pragma unroll
    for (int s = 0; s < HEAD_DIM / 16; ++s) {
#pragma unroll
      for (int n = 0; n < tile_keys / 8; n += 2) {
        u32 b[4];
        load_k(b, k_tile, lane, 8 * n, 2 * s);
        ptx::mma_m16n8k16<element>(score[n], a[s], b[0], b[1]);
        ptx::mma_m16n8k16<element>(score[n + 1], a[s], b[2], b[3]);
      }
    }
    if (first + tile_keys > seqlen_k || (causal && first + tile_keys > first_row + offset + 1)) {
#pragma unroll
      for (int n = 0; n < tile_keys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = first + 8 * n + 2 * t + i % 2, last = causal ? row + i / 2 * 8 + offset : seqlen_k;
          if (key >= seqlen_k || key > last) score[n][i] = -infinity;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // rows g and g + 8, of which four lanes have a part each
      float larger = max_score[r];
#pragma unroll
      for (int n = 0; n < tile_keys / 8; ++n) larger = max(larger, max(score[n][2 * r], score[n][2 * r + 1]));
      larger = max(larger, __shfl_xor_sync(0xffffffff, larger, 1));
      larger = max(larger, __shfl_xor_sync(0xffffffff, larger, 2));
      const float base = larger == -infinity ? 0 : larger * scale;  // inf - inf is NaN
      const float old = ptx::ex2_approx_ftz(max_score[r] * scale - base);
      max_score[r] = larger;
      sum[r] *= old;
#pragma unroll
      for (int n = 0; n < tile_keys / 8; ++n) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          score[n][i] = ptx::ex2_approx_ftz(score[n][i] * scale - base);
          sum[r] += score[n][i];
        }
      }
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; ++n) {
        o[n][2 * r] *= old;
        o[n][2 * r + 1] *= old;
      }
    }
#pragma unroll
    for (int s = 0; s < tile_keys / 16; ++s) {
      // Where mma leaves scores is where it wants its left operand, so P never leaves the registers.
      const u32 p[4] = {ptx::cvt_rn_x2<element>(score[2 * s][0], score[2 * s][1]),
                        ptx::cvt_rn_x2<element>(score[2 * s][2], score[2 * s][3]),
                        ptx::cvt_rn_x2<element>(score[2 * s + 1][0], score[2 * s + 1][1]),
                        ptx::cvt_rn_x2<element>(score[2 * s + 1][2], score[2 * s + 1][3])};
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; n += 2) {
        u32 b[4];
        load_v(b, v_tile, lane, 16 * s, n);
        ptx::mma_m16n8k16<element>(o[n], p, b[0], b[1]);
        ptx::mma_m16n8k16<element>(o[n + 1], p, b[2], b[3]);
      }
    }
    __syncthreads();  // nobody reads the tile any more: the next round copies into it
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] += __shfl_xor_sync(0xffffffff, sum[r], 1);
    sum[r] += __shfl_xor_sync(0xffffffff, sum[r], 2);
    const float factor = sum[r] > 0 ? 1 / sum[r] : 0;
    if (row + 8 * r >= seqlen_q) continue;
    u32* const to = reinterpret_cast<u32*>(out + (row + 8 * r) * step) + t;
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) {
      to[4 * n] = ptx::cvt_rn_x2<element>(o[n][2 * r] * factor, o[n][2 * r + 1] * factor);
    }
  }
}
