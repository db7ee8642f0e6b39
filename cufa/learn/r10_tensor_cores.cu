// Rung 10: products on the tensor cores. See r10_tensor_cores.py.
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"

using element = ELEMENT;
constexpr int warps = 4, threads = 32 * warps;
constexpr int rows = 16 * warps;  // of q: a warp has 16
constexpr int tile_keys = 64;
constexpr int chunks = HEAD_DIM / 8;  // of 16 bytes, in a row

// A row has 16 bytes more than there are, so that eight rows begin in different banks.
using Tile = element[tile_keys][HEAD_DIM + 8];

struct Smem {
  Tile k, v;
};

inline void load_tile(Tile& tile, const element* from, i64 step, int count) {
  const int chunk = threadIdx.x % chunks;
#pragma unroll
  for (int key = threadIdx.x / chunks; key < tile_keys; key += threads / chunks) {
    const uint4 zeros{0, 0, 0, 0};  // of keys that are not there, since 0 times what lies there may be NaN
    reinterpret_cast<uint4*>(tile[key])[chunk] =
        key < count ? reinterpret_cast<const uint4*>(from + key * step)[chunk] : zeros;
  }
}

inline u32 pair_of(const element* row) { return *reinterpret_cast<const u32*>(row); }
inline u32 pair_of(element low, element high) { return low.bits | u32(high.bits) << 16; }

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
  for (int first = 0; first < block_keys; first += tile_keys) {
    __syncthreads();
    load_tile(smem.k, k + first * step, step, seqlen_k - first);
    load_tile(smem.v, v + first * step, step, seqlen_k - first);
    __syncthreads();

    float score[tile_keys / 8][4] = {};
#pragma unroll
    for (int s = 0; s < HEAD_DIM / 16; ++s) {
#pragma unroll
      for (int n = 0; n < tile_keys / 8; ++n) {  // the right operand is 16 columns of eight keys
        const element* const key = &smem.k[8 * n + g][16 * s + 2 * t];
        ptx::mma_m16n8k16<element>(score[n], a[s], pair_of(key), pair_of(key + 8));
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
      for (int n = 0; n < HEAD_DIM / 8; ++n) {  // 16 keys of eight columns: pairs run down a column here
        const element(*const key)[HEAD_DIM + 8] = &smem.v[16 * s + 2 * t];
        const int c = 8 * n + g;
        ptx::mma_m16n8k16<element>(o[n], p, pair_of(key[0][c], key[1][c]), pair_of(key[8][c], key[9][c]));
      }
    }
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
