// attention: what a thread block of the forward with split keys works on: a tile of few query rows. The heads that
// share a key head share the tile: row r of a key head's tiles is query r / ratio of head r % ratio of these.
#pragma once

#include "attention/block_range.cuh"
#include "attention/params.cuh"
#include "attention/row_source.cuh"
#include "attention/seqlen.cuh"
#include "ptx/opaque.cuh"

namespace attention {

// A tile, and where its rows of q, `out` and lse are.
template <class Config>
struct SharedTile {
  using element = typename Config::element;

  Seqlen seqlen;
  int sequence, key_head, m_block, ratio;
  BlockRange blocks;  // of keys, of which the item's positions stand for those from the first on

  int batch() const { return sequence; }

  // What keys and values are to be multiplied by.
  static constexpr float k_descale() { return 1.0f; }
  static constexpr float v_descale() { return 1.0f; }

  // How many rows the tiles of the key head have, and where the tile begins.
  int rows() const { return seqlen.q * ratio; }
  int first_row() const { return m_block * Config::block_m; }

  // Which query, of which head, a row is.
  int query_of(int row) const { return u32(row) / u32(ratio); }
  int head_of(int row) const { return key_head * ratio + row - query_of(row) * ratio; }

  SharedRows<element> queries(const Params& params) const {
    const element* const first = head(params.q, params.q_strides, key_head * ratio);
    return {first + seqlen.q_first_row * params.q_strides.seqlen, params.q_strides, rows(), ratio};
  }
  const element* query_row(const Params& params, int row) const { return queries(params).at(row); }

  element* out_row(const Params& params, int row) const {
    const element* const first = head(params.out, params.out_strides, head_of(row));
    return const_cast<element*>(first) + (seqlen.q_first_row + query_of(row)) * params.out_strides.seqlen;
  }
  float* lse_row(const Params& params, int row) const {
    return params.lse + sequence * params.lse_batch_stride + head_of(row) * params.lse_head_stride +
           seqlen.q_first_row + query_of(row);
  }

 protected:
  const element* head(const void* pointer, const Strides& strides, int index) const {
    return static_cast<const element*>(pointer) + sequence * strides.batch + index * strides.head;
  }
};

// A tile of a key head of a dense sequence; only those of the most rows may be several, which follow each other so that
// those that read the same keys do so at the same time. It is a thread's own, and follows from its item without a look
// at memory.
template <class Config>
struct SplitWork : SharedTile<Config> {
  using element = typename Config::element;

  static constexpr bool several = Config::block_m == 64;

  SplitWork(const Params& params, int sequence, int key_head, int m_block)
      : SharedTile<Config>{dense_seqlen(params), sequence, key_head, m_block, params.qheads_per_khead} {
    this->blocks = item_blocks<Config>(params, this->seqlen, m_block);
    k = ptx::opaque(this->head(params.k, params.k_strides, this->key_head));
    v = ptx::opaque(this->head(params.v, params.v_strides, this->key_head));
  }

  // `argument` has Params, and how many key heads there are.
  template <class Argument>
  SplitWork(const Argument& argument, u32 item)
      : SplitWork(argument, item, several ? item / u32(argument.params.m_blocks) : item) {}

  PointedRows<element> keys(const Params& params) const { return {k, params.k_strides, this->seqlen.k}; }
  PointedRows<element> values(const Params& params) const { return {v, params.v_strides, this->seqlen.k}; }

  const element* key_row(const Params& params, int key) const { return keys(params).at(key); }
  const element* value_row(const Params& params, int key) const { return values(params).at(key); }

 private:
  // `head` is counted over all sequences.
  template <class Argument>
  SplitWork(const Argument& argument, u32 item, u32 head)
      : SplitWork(argument.params, head / u32(argument.num_heads_k), head % u32(argument.num_heads_k),
                  several ? item - head * argument.params.m_blocks : 0) {}

  const element *k, *v;  // where the sequence begins, which the loop does not compute anew
};

}  // namespace attention
