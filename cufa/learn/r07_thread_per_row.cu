// Rung 7: one thread per row of q. See r07_thread_per_row.py.
#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"

extern "C" __global__ __launch_bounds__(128) void attention(const ELEMENT* q, const ELEMENT* k, const ELEMENT* v,
                                                            ELEMENT* out, int seqlen_q, int seqlen_k, int heads,
                                                            float scale, bool causal) {
  const int row = blockIdx.x * 128 + threadIdx.x;
  if (row >= seqlen_q) return;
  const int batch = blockIdx.y / heads, head = blockIdx.y % heads;
  const i64 step = i64(heads) * HEAD_DIM;  // from a row of this head to the next one
  q += (i64(batch) * seqlen_q + row) * step + head * HEAD_DIM;
  out += (i64(batch) * seqlen_q + row) * step + head * HEAD_DIM;
  k += i64(batch) * seqlen_k * step + head * HEAD_DIM;
  v += i64(batch) * seqlen_k * step + head * HEAD_DIM;

  float max_score = -infinity, sum = 0, o[HEAD_DIM] = {};
  const int keys = causal ? min(seqlen_k, row + 1 + seqlen_k - seqlen_q) : seqlen_k;
  for (int key = 0; key < keys; ++key) {
    float score = 0;
#pragma unroll 4
    for (int c = 0; c < HEAD_DIM; ++c) score += ptx::cvt_f32(q[c]) * ptx::cvt_f32(k[key * step + c]);
    score *= scale;  // which has a factor log2(e), so that e^x is 2^x here
    const float larger = max(max_score, score);
    const float old = ptx::ex2_approx_ftz(max_score - larger);  // 2^-inf = 0 for the first key
    const float p = ptx::ex2_approx_ftz(score - larger);
    sum = sum * old + p;
#pragma unroll
    for (int c = 0; c < HEAD_DIM; ++c) o[c] = o[c] * old + p * ptx::cvt_f32(v[key * step + c]);
    max_score = larger;
  }
  const float factor = sum > 0 ? 1 / sum : 0;  // rows that see no key are 0
#pragma unroll
  for (int c = 0; c < HEAD_DIM; ++c) out[c] = ptx::cvt_rn<ELEMENT>(o[c] * factor);
}
