// attention: how long this sequence is and where its rows lie.
#pragma once

#include "attention/params.cuh"
#include "core/math.cuh"

namespace attention {

struct Seqlen {
  int q, k;                      // live lengths
  int q_first_row, k_first_row;  // row of the packed arrays where the sequence begins; 0 unless varlen

  // Query i sees key j through j - (i + diagonal): masks are aligned bottom-right.
  int diagonal() const { return k - q; }
};

inline Seqlen dense_seqlen(const Params& params) { return {params.seqlen_q, params.seqlen_k, 0, 0}; }

// Offsets are clamped to the packed arrays: whatever cu_seqlens holds, no address outside them is formed.
inline Seqlen varlen_seqlen(const Params& params, int batch) {
  const auto offset = [](const i32* cu_seqlens, i64 stride, int index, int low, int total) {
    return clamp(cu_seqlens[index * stride], low, total);
  };
  const int q0 = offset(params.cu_seqlens_q, params.cu_seqlens_q_stride, batch, 0, params.seqlen_q);
  const int q1 = offset(params.cu_seqlens_q, params.cu_seqlens_q_stride, batch + 1, q0, params.seqlen_q);
  const int k0 = offset(params.cu_seqlens_k, params.cu_seqlens_k_stride, batch, 0, params.seqlen_k);
  const int k1 = offset(params.cu_seqlens_k, params.cu_seqlens_k_stride, batch + 1, k0, params.seqlen_k);
  int k_live = k1 - k0;
  if (params.seqused_k) k_live = clamp(params.seqused_k[batch * params.seqused_k_stride], 0, k_live);
  return {q1 - q0, k_live, q0, k0};
}

}  // namespace attention
