// Rung 8: tiles of keys and values in shared memory. See r08_shared_tiles.py.
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"
#include "ptx/opaque.cuh"

constexpr int rows = 128;            // of q, and threads of a block
constexpr int tile_keys = 32;        // keys that are in shared memory at a time
constexpr int pairs = HEAD_DIM / 2;  // words of two elements in a row

// Copies a tile of rows, side by side: neighbouring threads read neighbouring words.
inline void load_tile(u32 (&tile)[tile_keys][pairs], const ELEMENT* from, i64 step, int count) {
  for (int i = threadIdx.x; i < tile_keys * pairs; i += rows) {
    const int key = i / pairs, pair = i % pairs;
    if (key < count) tile[key][pair] = reinterpret_cast<const u32*>(from + key * step)[pair];
  }
}

extern "C" __global__ __launch_bounds__(rows) void attention(const ELEMENT* q, const ELEMENT* k, const ELEMENT* v,
                                                             ELEMENT* out, int seqlen_q, int seqlen_k, int heads,
                                                             float scale, bool causal) {
  __shared__ u32 k_tile[tile_keys][pairs];
  __shared__ u32 v_tile[tile_keys][pairs];
  const int row = blockIdx.x * rows + threadIdx.x;
  const int batch = blockIdx.y / heads, head = blockIdx.y % heads;
  const i64 step = i64(heads) * HEAD_DIM;
  q += i64(batch) * seqlen_q * step + head * HEAD_DIM;
  out += i64(batch) * seqlen_q * step + head * HEAD_DIM;
  k += i64(batch) * seqlen_k * step + head * HEAD_DIM;
  v += i64(batch) * seqlen_k * step + head * HEAD_DIM;

  u32 q_row[pairs];  // two elements to a register, or q and o would not fit
#pragma unroll
  for (int c = 0; c < pairs; ++c) {
    q_row[c] = row < seqlen_q ? reinterpret_cast<const u32*>(q + row * step)[c] : 0;
  }
  float max_score = -infinity, sum = 0, o[HEAD_DIM] = {};
  const int offset = seqlen_k - seqlen_q;  // query i is at the position of key i + offset
  const int keys = row >= seqlen_q ? 0 : causal ? min(seqlen_k, row + 1 + offset) : seqlen_k;
  // The block goes on as long as its last row does: all threads load, and meet at the barriers.
  const int block_keys = causal ? min(seqlen_k, int(blockIdx.x + 1) * rows + offset) : seqlen_k;
  for (int first = 0; first < block_keys; first += tile_keys) {
    __syncthreads();  // nobody reads the tile before any more
    load_tile(k_tile, k + first * step, step, seqlen_k - first);
    load_tile(v_tile, v + first * step, step, seqlen_k - first);
    __syncthreads();
#pragma unroll 1
    for (int key = 0; key < min(tile_keys, keys - first); ++key) {
      float even = 0, odd = 0;  // two chains of additions, since each has to wait for the one before
#pragma unroll
      for (int c = 0; c < pairs; ++c) {
        // If all of q were unpacked before the loop, as the compiler would, 128 columns would not fit in registers.
        const u32 packed = HEAD_DIM > 64 ? ptx::opaque(int(q_row[c])) : q_row[c];
        const float2 a = ptx::cvt_f32_x2<ELEMENT>(packed), b = ptx::cvt_f32_x2<ELEMENT>(k_tile[key][c]);
        even += a.x * b.x;
        odd += a.y * b.y;
      }
      const float score = (even + odd) * scale;
      if (score > max_score) {  // which is seldom so: the k-th key has the largest score by a chance of 1 in k
        const float old = ptx::ex2_approx_ftz(max_score - score);
        sum *= old;
#pragma unroll
        for (int c = 0; c < HEAD_DIM; ++c) o[c] *= old;
        max_score = score;
      }
      const float p = ptx::ex2_approx_ftz(score - max_score);
      sum += p;
#pragma unroll
      for (int c = 0; c < pairs; ++c) {
        const float2 b = ptx::cvt_f32_x2<ELEMENT>(v_tile[key][c]);
        o[2 * c] += p * b.x;
        o[2 * c + 1] += p * b.y;
      }
    }
  }
  if (row >= seqlen_q) return;
  const float factor = sum > 0 ? 1 / sum : 0;
#pragma unroll
  for (int c = 0; c < pairs; ++c) {
    reinterpret_cast<u32*>(out + row * step)[c] = ptx::cvt_rn_x2<ELEMENT>(o[2 * c] * factor, o[2 * c + 1] * factor);
  }
}
