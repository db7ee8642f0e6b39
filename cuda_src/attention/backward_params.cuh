// attention: the one argument of every kernel of the backward. cufa/_params.py mirrors it.
#pragma once

#include "attention/packed.cuh"
#include "attention/params.cuh"
#include "core/types.cuh"
#include "ptx/tma.cuh"

namespace attention {

// What the forward was given (its lse strides are not used here), then the gradients and the workspace.
//
// The workspace has a number for every row of every query head in `row_lse` and `row_delta`. Packed sequences begin
// there with a multiple of four rows (workspace_row), whose numbers make 16 bytes, and the rows up to the next one's
// are written too; before all of them are padding_rows as if past an end. `dq_sum` has a tile of block_m ×
// tile_head_dim float32 numbers, in an order of the main kernel's own, for every tile of rows (sum_tile), none of which
// mixes sequences; or, with Config::sums_by_rows, tile_head_dim numbers for every row of q. With Config::writes_dq
// those of sequences whose keys are all in one block are not used, and dense there are none.
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
  i32* turns;  // of every tile of dq_sum. Deterministic: how many blocks of keys have added to it; else see SumState
  i32* next_unit;   // of main kernels whose thread blocks take one unit of work after the other
  i32* heads_done;  // those, dense: of every key head, how many blocks of keys have added all that they have to dq
  PackedOffset* offsets_q;  // packed: (batch + 1,)
  PackedOffset* offsets_k;
  i32* not_finite;  // whether anything is in the gradients that is not finite: see backward_repair.cuh
  float* chains;    // what the thread blocks of a main kernel take over: see tile/local.cuh; null: no sum is so long
  Strides dout_strides, dq_strides, dk_strides, dv_strides;
  Strides lse_strides, dlse_strides;  // dim is not used
  i64 workspace_rows;                 // numbers of a query head, of all sequences together; dense: of one sequence
  i32 n_blocks;                       // blocks of keys a key head: of a sequence, or (varlen) of the packed batch
  i32 reversed;                       // whether blocks of keys come, and add to dq, from last to first
};

// Of a tile of dq_sum that is not set to zeros beforehand: whoever comes first stores, the others add to that.
enum SumState : i32 { untouched, claimed, stored };

// Kernels that load through tensor maps find those of q, k, v and dout here; their axes are those of TmaParams.
struct BackwardArgument {
  ptx::TensorMap q, k, v, dout;
  BackwardParams params;
};

}  // namespace attention
