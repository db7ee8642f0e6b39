// Rung 9: a warp shares its rows. See r09_warp_rows.py.
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"

constexpr int warps = 4, threads = 32 * warps;
constexpr int warp_rows = 16, rows = warps * warp_rows;
constexpr int tile_keys = 64;
constexpr int chunks = HEAD_DIM / 8;  // of 16 bytes, in a row
// The lanes of a warp are a matrix of 4 x 8. One has four rows, and of these eight keys, and then an eighth of the
// columns of the output, in chunks.
constexpr int lane_rows = warp_rows / 4, lane_keys = tile_keys / 8, lane_chunks = chunks / 8;

// Rows of q and k have a chunk more than there is, and those of p eight numbers: lanes that read, or write, the same
// column of different rows then find them in different banks.
struct Smem {
  uint4 q[rows][chunks + 1];
  uint4 k[tile_keys][chunks + 1];
  uint4 v[tile_keys][chunks];
  float p[rows][tile_keys + 8];
};

inline void unpack(float (&to)[8], const uint4& chunk) {
  const u32 words[] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = ptx::cvt_f32_x2<ELEMENT>(words[i]);
    to[2 * i] = pair.x;
    to[2 * i + 1] = pair.y;
  }
}

extern "C" __global__ __launch_bounds__(threads, 3) void attention(const ELEMENT* q, const ELEMENT* k, const ELEMENT* v,
                                                                   ELEMENT* out, int seqlen_q, int seqlen_k, int heads,
                                                                   float scale, bool causal) {
  extern __shared__ __align__(16) char memory[];  // as much as the launch says
  Smem& smem = *reinterpret_cast<Smem*>(memory);
  const int lane = threadIdx.x % 32, g = lane / 8, t = lane % 8;
  const int warp_row = int(threadIdx.x / 32) * warp_rows + g;  // the first row of a lane, which has every fourth
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
    smem.q[row][chunk] = live ? reinterpret_cast<const uint4*>(q + (first_row + row) * step)[chunk] : zeros;
  }

  float max_score[lane_rows], sum[lane_rows] = {}, o[lane_rows][lane_chunks][8] = {};
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

    // Scores of four rows and eight keys: 12 chunks are read, and multiplied 256 times.
    float score[lane_rows][lane_keys] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      float row[lane_rows][8];
#pragma unroll
      for (int r = 0; r < lane_rows; ++r) unpack(row[r], smem.q[warp_row + 4 * r][chunk]);
#pragma unroll
      for (int n = 0; n < lane_keys; ++n) {
        float key[8];
        unpack(key, smem.k[t + 8 * n][chunk]);
#pragma unroll
        for (int r = 0; r < lane_rows; ++r) {
#pragma unroll
          for (int c = 0; c < 8; ++c) score[r][n] += row[r][c] * key[c];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < lane_rows; ++r) {
      const int last = min(seqlen_k - 1, causal ? first_row + warp_row + 4 * r + offset : seqlen_k);
      float larger = max_score[r];
#pragma unroll
      for (int n = 0; n < lane_keys; ++n) {
        if (first + t + 8 * n > last) score[r][n] = -infinity;
        larger = max(larger, score[r][n]);
      }
      for (int lanes = 4; lanes > 0; lanes /= 2) larger = max(larger, __shfl_xor_sync(0xffffffff, larger, lanes));
      const float base = larger == -infinity ? 0 : larger * scale;  // no key was seen yet, and inf - inf is NaN
      const float old = ptx::ex2_approx_ftz(max_score[r] * scale - base);
      max_score[r] = larger;
      sum[r] *= old;  // of this lane's keys; the lanes' sums are added up at the end
#pragma unroll
      for (int n = 0; n < lane_keys; ++n) {
        const float p = ptx::ex2_approx_ftz(score[r][n] * scale - base);
        sum[r] += p;
        smem.p[warp_row + 4 * r][t + 8 * n] = p;
      }
#pragma unroll
      for (int c = 0; c < lane_chunks; ++c) {
        for (float& each : o[r][c]) each *= old;
      }
    }
    __syncwarp();

    // The output of the same rows takes the probabilities of all keys, which come by shared memory, four at a time.
#pragma unroll 1
    for (int key = 0; key < tile_keys; key += 4) {
      float p[lane_rows][4];
#pragma unroll
      for (int r = 0; r < lane_rows; ++r) {
        const float4 four = *reinterpret_cast<const float4*>(&smem.p[warp_row + 4 * r][key]);
        p[r][0] = four.x, p[r][1] = four.y, p[r][2] = four.z, p[r][3] = four.w;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int c = 0; c < lane_chunks; ++c) {
          float value[8];
          unpack(value, smem.v[key + i][t + 8 * c]);
#pragma unroll
          for (int r = 0; r < lane_rows; ++r) {
#pragma unroll
            for (int j = 0; j < 8; ++j) o[r][c][j] += p[r][i] * value[j];
          }
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < lane_rows; ++r) {
    const int row = first_row + warp_row + 4 * r;
    float total = sum[r];
    for (int lanes = 4; lanes > 0; lanes /= 2) total += __shfl_xor_sync(0xffffffff, total, lanes);
    const float factor = total > 0 ? 1 / total : 0;
    if (row >= seqlen_q) continue;
#pragma unroll
    for (int c = 0; c < lane_chunks; ++c) {
      const float (&from)[8] = o[r][c];
      u32 words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = ptx::cvt_rn_x2<ELEMENT>(from[2 * i] * factor, from[2 * i + 1] * factor);
      reinterpret_cast<uint4*>(out + row * step)[t + 8 * c] = {words[0], words[1], words[2], words[3]};
    }
  }
}
