// attention: states, which are results of attention over some of the keys each, and what they weigh beside each other.
#pragma once

#include "attention/chunk_index.cuh"
#include "core/math.cuh"
#include "core/types.cuh"

namespace attention {

// `count` states, those of a, which lie state_step apart, and behind them b, if there is one. Steps are along chunks of
// a row, heads, rows and sequences. The host packs the same layout.
struct States {
  const void* out_a;
  const void* out_b;
  const f32* lse_a;
  const f32* lse_b;
  i64 out_a_steps[4], out_b_steps[4], lse_a_steps[4], lse_b_steps[4];
  i64 out_state_step, lse_state_step;
  i32 count;
};

// The states of the row that has a chunk, of which `weigh` or `weigh_together` has to find what they weigh.
template <class element>
struct RowStates {
  const States& states;
  int b;  // which state that is, or -1
  i64 out_a, out_b;
  const f32 *lse_a, *lse_b;
  float largest, sum;  // of lse, and of exp(lse - largest)

  RowStates(const States& states, const ChunkIndex& index)
      : states(states),
        b(states.out_b == nullptr ? -1 : states.count - 1),
        out_a(index.element(states.out_a_steps)),
        out_b(index.element(states.out_b_steps)),
        lse_a(states.lse_a + index.row_element(states.lse_a_steps)),
        lse_b(states.lse_b + index.row_element(states.lse_b_steps)) {}

  // For each thread by itself.
  void weigh() {
    largest = -infinity;
#pragma unroll 4  // loads do not wait for each other
    for (int state = 0; state < states.count; ++state) largest = fmaxf(largest, lse(state));
    sum = 0.0f;
    for (int state = 0; state < states.count; ++state) sum += unnormalized(lse(state));
  }

  // The same for `lanes` lanes that have the row together, each of which has read `first`, the lse of the state that is
  // its own. All lanes of the warp call this; those of a row that is not there say so.
  template <int lanes>
  void weigh_together(float first, bool is_there) {
    largest = first;
#pragma unroll 1
    for (int state = lanes; state < states.count; state += lanes) {
      largest = fmaxf(largest, lse_of_lane<lanes>(state, is_there));
    }
#pragma unroll
    for (int step = 1; step < lanes; step *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    sum = 0.0f;
    float own = unnormalized(first);
#pragma unroll 1
    for (int state = 0; state < states.count; ++state) {
      if (state > 0 && state % lanes == 0) own = unnormalized(lse_of_lane<lanes>(state, is_there));
      sum += __shfl_sync(0xffffffffu, own, state % lanes, lanes);
    }
  }

  bool is_b(int state) const { return state == b; }

  float lse(int state) const {
    const f32* const from = is_b(state) ? lse_b : lse_a;
    return from[is_b(state) ? 0 : state * states.lse_state_step];
  }

  // lse of the state that is this lane's among as many as there are lanes; -inf if there is none.
  template <int lanes>
  float lse_of_lane(int first, bool is_there) const {
    const int state = first + int(threadIdx.x % lanes);
    return is_there && state < states.count ? lse(state) : -infinity;
  }

  // Whether a state has no keys: then what its out holds does not count.
  bool is_empty(int state) const { return lse(state) == -infinity; }

  // exp(lse - largest). The largest counts 1 even if it is infinite, as is that of a sink which takes all probability.
  float unnormalized(float lse) const {
    if (lse == -infinity) return 0.0f;
    return lse == largest ? 1.0f : exp2f((lse - largest) * log2_e);
  }

  // What the state's out counts in the merged one; 0 for a state without keys.
  float weight(int state) const { return is_empty(state) ? 0.0f : unnormalized(lse(state)) / sum; }

  float merged_lse() const { return sum == 0.0f ? -infinity : largest + ln_2 * log2f(sum); }

  // The row's chunk that is some steps along chunks behind the index.
  const element* out(int state, int chunk) const {
    return is_b(state) ? out_of_b(chunk) : out_of_a(chunk) + state * states.out_state_step;
  }

  const element* out_of_a(int chunk) const {
    return static_cast<const element*>(states.out_a) + (out_a + chunk * states.out_a_steps[0]);
  }

  const element* out_of_b(int chunk) const {
    return static_cast<const element*>(states.out_b) + (out_b + chunk * states.out_b_steps[0]);
  }
};

}  // namespace attention
