// attention: states, which are results of attention over some of the keys each, and what they weigh beside each other.
#pragma once

#include "attention/chunk_index.cuh"
#include "core/math.cuh"
#include "core/types.cuh"

namespace attention {

// The states a and b or, where there is no b, as many as lie state_step apart in a. Steps are along chunks of a row,
// heads, rows and sequences. The host packs the same layout.
struct States {
  const void* out_a;
  const void* out_b;
  const f32* lse_a;
  const f32* lse_b;
  i64 out_a_steps[4], out_b_steps[4], lse_a_steps[4], lse_b_steps[4];
  i64 out_state_step, lse_state_step;
  i32 count;
};

// The states of the row that has a chunk.
template <class element>
struct RowStates {
  const States& states;
  i64 out_a, out_b;
  const f32 *lse_a, *lse_b;
  float largest, sum;  // of lse, and of exp(lse - largest)

  RowStates(const States& states, const ChunkIndex& index)
      : states(states),
        out_a(index.element(states.out_a_steps)),
        out_b(index.element(states.out_b_steps)),
        lse_a(states.lse_a + index.element(states.lse_a_steps)),
        lse_b(states.lse_b + index.element(states.lse_b_steps)) {
    largest = -infinity;
#pragma unroll 4  // loads do not wait for each other
    for (int state = 0; state < states.count; ++state) largest = fmaxf(largest, lse(state));
    sum = 0.0f;
    for (int state = 0; state < states.count; ++state) sum += unnormalized(lse(state));
  }

  bool is_b(int state) const { return state > 0 && states.out_b != nullptr; }

  float lse(int state) const { return is_b(state) ? *lse_b : lse_a[state * states.lse_state_step]; }

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

  // The row's chunk, or that some steps along chunks behind it.
  const element* out(int state, int chunk = 0) const {
    if (is_b(state)) return static_cast<const element*>(states.out_b) + (out_b + chunk * states.out_b_steps[0]);
    return static_cast<const element*>(states.out_a) +
           (out_a + state * states.out_state_step + chunk * states.out_a_steps[0]);
  }
};

}  // namespace attention
