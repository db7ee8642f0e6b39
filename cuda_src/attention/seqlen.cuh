// attention: how long this sequence is and where its rows lie.
#pragma once

#include "attention/packed.cuh"
#include "attention/params.cuh"
#include "core/math.cuh"

namespace attention {

struct Seqlen {
  int q, k;                      // live lengths
  int q_first_row, k_first_row;  // row of the packed arrays where the sequence begins; 0 unless varlen

  // Query i sees key j through j - (i + diagonal): masks are aligned bottom-right.
  constexpr int diagonal() const { return k - q; }
};

constexpr Seqlen dense_seqlen(const Params& params) { return {params.seqlen_q, params.seqlen_k, 0, 0}; }

constexpr Seqlen packed_seqlen(const Params& params, const PackedSequence& sequence) {
  if (sequence.batch < 0) return {0, 0, 0, 0};
  const int keys = live_keys(params, sequence.batch, sequence.k_end - sequence.k_begin);
  return {sequence.q_end - sequence.q_begin, keys, sequence.q_begin, sequence.k_begin};
}

}  // namespace attention
