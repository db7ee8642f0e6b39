// Rung 13: wgmma, tensor copies and specialised warps. See r13_hopper.py.
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

using element = ELEMENT;
constexpr int consumers = 2, rows = 64 * consumers;  // a wgmma has 64 rows
constexpr int tile_keys = 128, stages = 2;
constexpr int panels = HEAD_DIM / 64;  // a tile is stored as panels of 64 columns, 128 bytes a row
constexpr u32 row_bytes = 128, q_panel = 64 * row_bytes, kv_panel = tile_keys * row_bytes;

struct Smem {
  u8 q[consumers][panels * q_panel];
  u8 k[stages][panels * kv_panel];
  u8 v[stages][panels * kv_panel];
  u64 q_full, k_full[stages], v_full[stages], k_empty[stages], v_empty[stages];
};

// A ring of tiles: of the n-th tile, the barrier of its stage has completed n / stages phases before.
inline void wait(const u64& barrier, int parity) {
  while (!ptx::mbarrier_try_wait_parity(ptx::shared_address(&barrier), parity)) {
  }
}
inline void wait_full(const u64 (&full)[stages], int n) { wait(full[n % stages], n / stages & 1); }
inline void wait_empty(const u64 (&empty)[stages], int n) { wait(empty[n % stages], ~(n / stages) & 1); }

// Each warp gives a stage back for itself, when its products have read it.
inline void release(const u64 (&empty)[stages], int n) {
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ptx::shared_address(&empty[n % stages]));
}

// Begins to copy rows of a head, panel by panel; rows behind the end become zeros.
inline void load(const u8* to, u32 panel_bytes, const ptx::TensorMap& map, const u64& barrier, int row, int head,
                 int batch) {
#pragma unroll
  for (int panel = 0; panel < panels; ++panel) {
    ptx::cp_async_bulk_tensor_4d(ptx::shared_address(to) + panel * panel_bytes, map, ptx::shared_address(&barrier),
                                 64 * panel, head, row, batch);
  }
}

// How a wgmma finds an operand: its address, the bytes from one panel to the next, which count where the operand is
// `transposed`, those from eight rows to the next eight, and the swizzle of 128 bytes.
inline u64 descriptor(const u8* tile, u32 panel_bytes) {
  return u64((ptx::shared_address(tile) & 0x3ffff) >> 4) | u64(panel_bytes >> 4) << 16 | u64(8 * row_bytes >> 4) << 32 |
         u64(1) << 62;
}

template <int n>
inline void hold(float (&x)[n][4]) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::hold(x[j][i]);
  }
}

using Scores = float[tile_keys / 8][4];
using Probabilities = u32[tile_keys / 16][4];
using Out = float[HEAD_DIM / 8][4];

// Begins score = q kᵀ, of 16 columns at a time. Steps within a panel are 32 bytes.
inline void begin_scores(Scores& score, const u8* q, const u8* k) {
  const u64 a = descriptor(q, q_panel), b = descriptor(k, kv_panel);
  hold(score);
  ptx::wgmma_fence();
#pragma unroll
  for (int s = 0; s < HEAD_DIM / 16; ++s) {
    const u32 within = s % 4 * 32, panel = s / 4;
    ptx::wgmma_ss<element, false>(score, a + ((panel * q_panel + within) >> 4), b + ((panel * kv_panel + within) >> 4),
                                  s > 0);
  }
  ptx::wgmma_commit_group();
}

// Begins out += p v, of 16 keys at a time, which are rows of v here, so v is transposed.
inline void begin_out(Out& out, const Probabilities& p, const u8* v, bool accumulate) {
  const u64 b = descriptor(v, kv_panel);
  hold(out);
  ptx::wgmma_fence();
#pragma unroll
  for (int s = 0; s < tile_keys / 16; ++s) {
    ptx::wgmma_rs<element, true>(out, p[s], b + (s * 16 * row_bytes >> 4), accumulate || s > 0);
  }
  ptx::wgmma_commit_group();
}

// The online softmax of a thread's two rows, of which three other lanes have the rest.
struct Softmax {
  float largest[2] = {-infinity, -infinity}, sum[2] = {};

  // Scores become probabilities; `old` is what earlier ones have to be multiplied by.
  inline void update(Scores& score, float scale, float (&old)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float larger = largest[r];
#pragma unroll
      for (int j = 0; j < tile_keys / 8; ++j) larger = max(larger, max(score[j][2 * r], score[j][2 * r + 1]));
      larger = max(larger, __shfl_xor_sync(0xffffffff, larger, 1));
      larger = max(larger, __shfl_xor_sync(0xffffffff, larger, 2));
      const float base = larger == -infinity ? 0 : larger * scale;
      old[r] = ptx::ex2_approx_ftz(largest[r] * scale - base);
      largest[r] = larger;
      sum[r] *= old[r];
#pragma unroll
      for (int j = 0; j < tile_keys / 8; ++j) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) sum[r] += score[j][i] = ptx::ex2_approx_ftz(score[j][i] * scale - base);
      }
    }
  }
};

inline void pack(Probabilities& p, const Scores& score) {
#pragma unroll
  for (int s = 0; s < tile_keys / 16; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&pair)[4] = score[2 * s + i / 2];
      p[s][i] = ptx::cvt_rn_x2<element>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
    }
  }
}

extern "C" __global__ __launch_bounds__(128 * (consumers + 1),
                                        1) void attention(const __grid_constant__ ptx::TensorMap q_map,
                                                          const __grid_constant__ ptx::TensorMap k_map,
                                                          const __grid_constant__ ptx::TensorMap v_map, ELEMENT* out,
                                                          int seqlen_q, int seqlen_k, int heads, float scale,
                                                          bool causal) {
  extern __shared__ __align__(1024) char memory[];  // where the swizzle begins anew
  Smem& smem = *reinterpret_cast<Smem*>(memory);
  const int tile = gridDim.x - 1 - blockIdx.x;  // under a causal mask the longest first, lest they end last
  const int batch = blockIdx.y / heads, head = blockIdx.y % heads;
  const int first_row = tile * rows, offset = seqlen_k - seqlen_q;
  const int tiles = ceil_div(max(0, causal ? min(seqlen_k, first_row + rows + offset) : seqlen_k), tile_keys);

  if (threadIdx.x == 0) {
    ptx::mbarrier_init(ptx::shared_address(&smem.q_full), 1);
    for (int stage = 0; stage < stages; ++stage) {
      ptx::mbarrier_init(ptx::shared_address(&smem.k_full[stage]), 1);
      ptx::mbarrier_init(ptx::shared_address(&smem.v_full[stage]), 1);
      ptx::mbarrier_init(ptx::shared_address(&smem.k_empty[stage]), 4 * consumers);
      ptx::mbarrier_init(ptx::shared_address(&smem.v_empty[stage]), 4 * consumers);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (threadIdx.x < 128) {  // the producer: one thread, which keeps the copies in flight
    ptx::setmaxnreg_dec<24>();
    if (threadIdx.x > 0 || tiles == 0) return;
    ptx::mbarrier_arrive_expect_tx(ptx::shared_address(&smem.q_full), sizeof(smem.q));
    for (int w = 0; w < consumers; ++w) {
      load(smem.q[w], q_panel, q_map, smem.q_full, first_row + 64 * w, head, batch);
    }
    for (int n = 0; n < tiles; ++n) {
      const int stage = n % stages;
      wait_empty(smem.k_empty, n);
      ptx::mbarrier_arrive_expect_tx(ptx::shared_address(&smem.k_full[stage]), sizeof(smem.k[0]));
      load(smem.k[stage], kv_panel, k_map, smem.k_full[stage], n * tile_keys, head, batch);
      wait_empty(smem.v_empty, n);
      ptx::mbarrier_arrive_expect_tx(ptx::shared_address(&smem.v_full[stage]), sizeof(smem.v[0]));
      load(smem.v[stage], kv_panel, v_map, smem.v_full[stage], n * tile_keys, head, batch);
    }
    return;
  }

  ptx::setmaxnreg_inc<240>();  // the consumers: a warpgroup for every 64 rows
  const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
  const int row = first_row + 64 * group + int(threadIdx.x / 32 % 4) * 16 + lane / 4;  // and eight rows below
  Scores score;
  Probabilities p;
  Out o = {};
  Softmax softmax;
  float old[2];
  const auto mask = [&](int first) {
    if (first + tile_keys <= (causal ? min(seqlen_k, first_row + 64 * group + offset + 1) : seqlen_k)) return;
#pragma unroll
    for (int j = 0; j < tile_keys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first + 8 * j + lane % 4 * 2 + i % 2;
        if (key >= seqlen_k || (causal && key > row + i / 2 * 8 + offset)) score[j][i] = -infinity;
      }
    }
  };
  if (tiles > 0) {
    wait(smem.q_full, 0);
    wait_full(smem.k_full, 0);
    begin_scores(score, smem.q[group], smem.k[0]);
    ptx::wgmma_wait_group<0>();
    hold(score);
    release(smem.k_empty, 0);
    mask(0);
    softmax.update(score, scale, old);
    pack(p, score);
    if (tiles > 1) wait_full(smem.k_full, 1);
    // Scores of a tile beside the output of the tile before: the tensor cores work on the latter while the softmax of
    // the former is computed.
    for (int n = 1; n < tiles; ++n) {
      begin_scores(score, smem.q[group], smem.k[n % stages]);
      wait_full(smem.v_full, n - 1);
      begin_out(o, p, smem.v[(n - 1) % stages], n > 1);
      ptx::wgmma_wait_group<1>();
      hold(score);
      release(smem.k_empty, n);
      mask(n * tile_keys);
      softmax.update(score, scale, old);
      // The compiler moves a wait for products above everything that it does not depend on, unless there is a branch.
      if (n + 1 < tiles) wait_full(smem.k_full, n + 1);
      ptx::wgmma_wait_group<0>();
      hold(o);
      release(smem.v_empty, n - 1);
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[j][i] *= old[i / 2];
      }
      pack(p, score);
    }
    wait_full(smem.v_full, tiles - 1);
    begin_out(o, p, smem.v[(tiles - 1) % stages], tiles > 1);
    ptx::wgmma_wait_group<0>();
    hold(o);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = softmax.sum[r];
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    const float factor = sum > 0 ? 1 / sum : 0;
    if (row + 8 * r >= seqlen_q) continue;
    const i64 at = ((i64(batch) * seqlen_q + row + 8 * r) * heads + head) * HEAD_DIM;
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; ++j) {
      reinterpret_cast<u32*>(out + at)[4 * j + lane % 4] =
          ptx::cvt_rn_x2<element>(o[j][2 * r] * factor, o[j][2 * r + 1] * factor);
    }
  }
}
