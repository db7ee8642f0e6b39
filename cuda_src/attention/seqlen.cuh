// attention: how long a sequence is and where its rows lie.
#pragma once

#include "attention/packed.cuh"
#include "attention/params.cuh"
#include "core/math.cuh"

namespace attention {

struct Seqlen {
  int q, k;                      // how many rows of q and keys are live
  int q_first_row, k_first_row;  // the rows of the packed arrays with which the sequence begins; 0 unless varlen

  // Masks are aligned bottom-right: key i + diagonal is query i's own, and what the query sees of key j depends on
  // j - (i + diagonal).
  constexpr int diagonal() const { return k - q; }
};

constexpr Seqlen dense_seqlen(const Params& params) { return {params.seqlen_q, params.seqlen_k, 0, 0}; }

constexpr Seqlen packed_seqlen(const Params& params, const PackedSequence& sequence) {
  if (sequence.batch < 0) return {0, 0, 0, 0};
  const int keys = live_keys(params, sequence.batch, sequence.k_end - sequence.k_begin);
  return {sequence.q_end - sequence.q_begin, keys, sequence.q_begin, sequence.k_begin};
}

// How long sequences are that the host, or offsets, tell the lengths of.
struct GivenLengths {
  static constexpr Seqlen dense(const Params& params, int) { return dense_seqlen(params); }
  static constexpr Seqlen packed(const Params& params, const PackedSequence& sequence) {
    return packed_seqlen(params, sequence);
  }
};

}  // namespace attention
