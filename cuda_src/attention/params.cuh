// attention: what a forward kernel is told of its problem: its argument, or a part of that (attention/tma_params.cuh).
// The host packs the same layout, and the generated source asserts that the two agree. Strides are in elements.
#pragma once

#include "core/types.cuh"

namespace attention {

struct Strides {
  i64 batch, seqlen, head, dim;  // varlen: batch is 0 and seqlen strides over the packed rows
};

struct Params {
  static constexpr int max_term_words = 72;  // as many as all terms of cufa take together

  const void* q;
  const void* k;
  const void* v;
  void* out;
  float* lse;               // (batch, num_heads_q, seqlen_q) or (num_heads_q, total_q); null: not wanted
  const float* sinks;       // (heads,)
  const i32* cu_seqlens_q;  // (batch + 1,)
  const i32* cu_seqlens_k;  // (batch + 1,)
  const i32* seqused_k;     // (batch,); null: whole sequences are live
  Strides q_strides, k_strides, v_strides, out_strides;
  i64 lse_batch_stride, lse_head_stride;
  i64 sinks_stride, cu_seqlens_q_stride, cu_seqlens_k_stride, seqused_k_stride;
  i32 batch, seqlen_q, seqlen_k;  // varlen: seqlen_q and seqlen_k are the packed totals
  i32 num_heads_q, qheads_per_khead;
  i32 m_blocks;           // query tiles per head: of a sequence, or (varlen) of the whole packed batch
  i32 heads_per_section;  // heads scheduled side by side, so that their K and V share the L2
  i32 window_left, window_right;
  float softmax_scale;
  i32 m_units;                // units of work per head, which are tiles, or pairs of tiles
  i32 units_per_block;        // units that a block takes in a row, where sequences are many
  i32 clear_out;              // whether rows of `out` that are no sequence's are to hold zeros
  float exponent_scale;       // softmax_scale · log2 e
  u64 terms[max_term_words];  // what the score terms are given, one after the other: see Variant
};

}  // namespace attention
