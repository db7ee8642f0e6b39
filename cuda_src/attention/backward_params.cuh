// attention: BackwardArgument, the one argument of every kernel of the backward, and what it consists of. The host
// packs the same layout, and the generated source asserts that the two agree.
#pragma once

#include "attention/packed.cuh"
#include "attention/params.cuh"
#include "core/types.cuh"
#include "ptx/tma.cuh"

namespace attention {

// What the forward was given (its lse strides are not used here), then the gradients and the workspace.
//
// The workspace has a number for every row of every query head in `row_lse` and `row_delta`. There a packed sequence
// begins at a multiple of four rows (workspace_row), whose numbers make 16 bytes, and the rows up to where the next
// sequence begins are written too; padding_rows numbers before all rows have the values of rows past an end.
//
// `dq_sum` has a tile of block_m × tile_head_dim float32 numbers, in an order of the main kernel's own, for every tile
// of rows (sum_tile), none of which mixes sequences; or, with Config::sums_by_rows, tile_head_dim numbers for every row
// of q. With Config::writes_dq the numbers of sequences whose keys are all in one block are not used, and dense arrays
// have no dq_sum.
struct BackwardParams {
  Params forward;
  const void* dout;
  const float* dlse;  // null: 0
  void* dq;
  void* dk;
  void* dv;
  float* dsinks;     // (heads,); null: no sinks
  float* row_lse;    // lse · log2 e; +infinity for a row that sees no key or is past the end, so that its P is 0
  float* row_delta;  // rowsum(out ∘ dout) - dlse
  float* dq_sum;
  i32* turns;  // per tile of dq_sum: how many blocks of keys have added to it (deterministic), or its SumState (else)
  i32* next_unit;   // the next unit that a thread block takes, where blocks take one after the other: see UnitCount
  i32* heads_done;  // with Config::finishes: how many blocks of keys have added to dq all that they add, see done_count
  PackedOffset* offsets_q;  // packed: (batch + 1,)
  PackedOffset* offsets_k;
  i32* not_finite;  // whether anything in the gradients is not finite: see backward_repair.cuh
  float* chains;    // sums that the blocks of a main kernel have taken over: see tile/local.cuh; null: none is so long
  Strides dout_strides, dq_strides, dk_strides, dv_strides;
  Strides lse_strides, dlse_strides;  // dim is not used
  i64 workspace_rows;                 // rows of row_lse per query head: of all packed sequences, or of a dense one
  i32 n_blocks;                       // blocks of keys per key head: of a sequence, or (varlen) of the packed batch
  i32 middle;                         // where the order begins in which blocks of keys come, see ordered_block
  i32 late_sums;                      // how many tiles lie before the sums of late blocks, see is_late; 0: none are
};

// The state of a tile of dq_sum that is not set to zeros beforehand: the block that comes first stores its part, and
// the others add theirs to that.
enum SumState : i32 { untouched, claimed, stored };

// Which of the numbers at BackwardParams::next_unit is a kernel's. Of two passes each counts its own units, since both
// may be under way; one pass has the first alone.
enum UnitCount : int { key_units, query_units, unit_counts };

// Kernels that load through tensor maps find those of q, k, v and dout here. All four have the axes that TmaParams says
// for k and v; that of an array of scores, if a term stages one, those that it says for that.
struct BackwardArgument {
  ptx::TensorMap q, k, v, dout;
  BackwardParams params;
  ptx::TensorMap scores;
};

}  // namespace attention
