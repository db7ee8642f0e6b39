// attention: what a thread block of the forward with split keys works on: a tile of few query rows of a dense sequence.
// The heads that share a key head share the tile: its row r is query r / ratio of head r % ratio of these. A work is a
// thread's own; what the tile's rows are follows from the item, without a look at memory.
#pragma once

#include "attention/block_range.cuh"
#include "attention/params.cuh"
#include "attention/row_source.cuh"
#include "attention/seqlen.cuh"
#include "attention/split_params.cuh"
#include "ptx/opaque.cuh"

namespace attention {

template <class Config>
struct SplitWork {
  using element = typename Config::element;

  Seqlen seqlen;
  BlockRange blocks;  // of keys, of which the item's positions stand for those from the first on

  SplitWork(const SplitParams& argument, int item)
      : sequence(u32(item) / u32(argument.num_heads_k)),
        key_head(item - sequence * argument.num_heads_k),
        ratio(argument.params.qheads_per_khead) {
    const Params& params = argument.params;
    seqlen = dense_seqlen(params);
    find_block_range<Config>(params, seqlen, 0, seqlen.q - 1, blocks);
    k = ptx::opaque(head(params.k, params.k_strides, key_head));
    v = ptx::opaque(head(params.v, params.v_strides, key_head));
  }

  int batch() const { return sequence; }

  // The tile has all rows of its key head.
  int rows() const { return seqlen.q * ratio; }
  static constexpr int first_row() { return 0; }

  // Which query, of which head, a row is.
  int query_of(int row) const { return u32(row) / u32(ratio); }
  int head_of(int row) const { return key_head * ratio + row - query_of(row) * ratio; }

  SharedRows<element> queries(const Params& params) const {
    return {head(params.q, params.q_strides, key_head * ratio), params.q_strides, rows(), ratio};
  }
  PointedRows<element> keys(const Params& params) const { return {k, params.k_strides, seqlen.k}; }
  PointedRows<element> values(const Params& params) const { return {v, params.v_strides, seqlen.k}; }

  const element* query_row(const Params& params, int row) const { return queries(params).at(row); }
  const element* key_row(const Params& params, int key) const { return keys(params).at(key); }
  const element* value_row(const Params& params, int key) const { return values(params).at(key); }

  element* out_row(const Params& params, int row) const {
    const element* const first = head(params.out, params.out_strides, head_of(row));
    return const_cast<element*>(first) + query_of(row) * params.out_strides.seqlen;
  }
  float* lse_row(const Params& params, int row) const {
    return params.lse + sequence * params.lse_batch_stride + head_of(row) * params.lse_head_stride + query_of(row);
  }

 private:
  int sequence, key_head, ratio;
  const element *k, *v;  // where the sequence begins, which the loop does not compute anew

  const element* head(const void* pointer, const Strides& strides, int index) const {
    return static_cast<const element*>(pointer) + sequence * strides.batch + index * strides.head;
  }
};

}  // namespace attention
