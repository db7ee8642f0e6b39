// Rung 9: a warp shares its rows. See r09_warp_rows.py.
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"

constexpr int warps = 4, threads = 32 * warps;
constexpr int warp_rows = 8, rows = warps * warp_rows;
constexpr int tile_keys = 32;             // one for each lane
constexpr int chunks = HEAD_DIM / 8;      // of 16 bytes, in a row
constexpr int lane_cols = HEAD_DIM / 32;  // columns of the output that a lane has
constexpr u32 all_lanes = 0xffffffff;

struct Smem {
  float q[rows][HEAD_DIM];
  float p[warps][warp_rows][tile_keys];
  // A chunk more than there is in a row: eight lanes that read the same chunk of eight rows then find it in different
  // banks.
  uint4 k[tile_keys][chunks + 1];
  uint4 v[tile_keys][chunks];
};

inline float max_of_warp(float x) {
  for (int step = 16; step > 0; step /= 2) x = max(x, __shfl_xor_sync(all_lanes, x, step));
  return x;
}

inline float sum_of_warp(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(all_lanes, x, step);
  return x;
}

inline void unpack(float (&to)[8], const uint4& chunk) {
  const u32 words[] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = ptx::cvt_f32_x2<ELEMENT>(words[i]);
    to[2 * i] = pair.x;
    to[2 * i + 1] = pair.y;
  }
}

extern "C" __global__ __launch_bounds__(threads) void attention(const ELEMENT* q, const ELEMENT* k, const ELEMENT* v,
                                                                ELEMENT* out, int seqlen_q, int seqlen_k, int heads,
                                                                float scale, bool causal) {
  extern __shared__ __align__(16) char memory[];  // as much as the launch says
  Smem& smem = *reinterpret_cast<Smem*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int batch = blockIdx.y / heads, head = blockIdx.y % heads;
  const int first_row = blockIdx.x * rows, offset = seqlen_k - seqlen_q;
  const i64 step = i64(heads) * HEAD_DIM;
  q += i64(batch) * seqlen_q * step + head * HEAD_DIM;
  out += i64(batch) * seqlen_q * step + head * HEAD_DIM;
  k += i64(batch) * seqlen_k * step + head * HEAD_DIM;
  v += i64(batch) * seqlen_k * step + head * HEAD_DIM;

  const uint4 zeros{0, 0, 0, 0};
  for (int i = threadIdx.x; i < rows * chunks; i += threads) {
    const int row = i / chunks, chunk = i % chunks;
    const bool live = first_row + row < seqlen_q;
    const uint4 found = live ? reinterpret_cast<const uint4*>(q + (first_row + row) * step)[chunk] : zeros;
    float numbers[8];
    unpack(numbers, found);
    for (int c = 0; c < 8; ++c) smem.q[row][8 * chunk + c] = numbers[c] * scale;
  }

  float max_score[warp_rows], sum[warp_rows] = {}, o[warp_rows][lane_cols] = {};
  for (float& each : max_score) each = -infinity;
  const int block_keys = causal ? min(seqlen_k, first_row + rows + offset) : seqlen_k;
  for (int first = 0; first < block_keys; first += tile_keys) {
    __syncthreads();
    for (int i = threadIdx.x; i < tile_keys * chunks; i += threads) {
      const int key = i / chunks, chunk = i % chunks;
      const bool live = first + key < seqlen_k;
      smem.k[key][chunk] = live ? reinterpret_cast<const uint4*>(k + (first + key) * step)[chunk] : zeros;
      smem.v[key][chunk] = live ? reinterpret_cast<const uint4*>(v + (first + key) * step)[chunk] : zeros;
    }
    __syncthreads();

    // A lane has a key: its scores with all rows of the warp.
    float score[warp_rows] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      float own[8];
      unpack(own, smem.k[lane][chunk]);
#pragma unroll
      for (int r = 0; r < warp_rows; ++r) {
        const float4* const row = reinterpret_cast<const float4*>(smem.q[warp * warp_rows + r]) + 2 * chunk;
        const float4 a = row[0], b = row[1];
        const float numbers[] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int c = 0; c < 8; ++c) score[r] += numbers[c] * own[c];
      }
    }
#pragma unroll
    for (int r = 0; r < warp_rows; ++r) {
      const int row = first_row + warp * warp_rows + r, key = first + lane;
      if (key >= seqlen_k || (causal && key > row + offset)) score[r] = -infinity;
      const float larger = max(max_score[r], max_of_warp(score[r]));
      const float base = larger == -infinity ? 0 : larger;  // no key of the row was seen yet, and inf - inf is NaN
      const float old = ptx::ex2_approx_ftz(max_score[r] - base), p = ptx::ex2_approx_ftz(score[r] - base);
      sum[r] = sum[r] * old + p;  // of this lane's keys; the lanes' sums are added up at the end
      for (float& each : o[r]) each *= old;
      max_score[r] = larger;
      smem.p[warp][r][lane] = p;
    }
    __syncwarp();

    // A lane has columns: it needs the probabilities of all keys, four at a time.
#pragma unroll 2
    for (int key = 0; key < tile_keys; key += 4) {
      float values[4][lane_cols];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const u32* const row = reinterpret_cast<const u32*>(smem.v[key + i]) + lane * (lane_cols / 2);
#pragma unroll
        for (int c = 0; c < lane_cols / 2; ++c) {
          const float2 pair = ptx::cvt_f32_x2<ELEMENT>(row[c]);
          values[i][2 * c] = pair.x;
          values[i][2 * c + 1] = pair.y;
        }
      }
#pragma unroll
      for (int r = 0; r < warp_rows; ++r) {
        const float4 p = reinterpret_cast<const float4*>(smem.p[warp][r])[key / 4];
#pragma unroll
        for (int c = 0; c < lane_cols; ++c) {
          o[r][c] += p.x * values[0][c];
          o[r][c] += p.y * values[1][c];
          o[r][c] += p.z * values[2][c];
          o[r][c] += p.w * values[3][c];
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < warp_rows; ++r) {
    const int row = first_row + warp * warp_rows + r;
    const float total = sum_of_warp(sum[r]), factor = total > 0 ? 1 / total : 0;
    if (row >= seqlen_q) continue;
    u32* const to = reinterpret_cast<u32*>(out + row * step) + lane * (lane_cols / 2);
#pragma unroll
    for (int c = 0; c < lane_cols / 2; ++c) {
      to[c] = ptx::cvt_rn_x2<ELEMENT>(o[r][2 * c] * factor, o[r][2 * c + 1] * factor);
    }
  }
}
