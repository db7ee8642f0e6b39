// attention: the online softmax over blocks of keys (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022).
#pragma once

#include "core/math.cuh"
#include "core/types.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"
#include "tile/accumulator.cuh"

namespace attention {

// The type in which probabilities are multiplied with values: that of q, or, where values are e4m3, float16, which
// holds those exactly, and probabilities better than bfloat16.
template <class element, class kv_element>
struct Probability {
  using type = element;
};
template <class element>
struct Probability<element, e4m3> {
  using type = f16;
};
template <class Config>
using ProbabilityOf = typename Probability<typename Config::element, typename Config::kv_element>::type;

// The factor that makes a mean of the sums of a finished row, and the row's natural log-sum-exp.
struct RowTotal {
  float factor, lse;
};

// The factors that make means of the sums of finished rows, and the rows' natural log-sum-exps.
template <int m_tiles>
struct Totals {
  float factor[m_tiles][2];
  float lse[m_tiles][2];

  template <int cols>
  void divide(tile::Accumulator<m_tiles, cols>& out) const {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < cols / 8; ++j) {
          out.x[t][j][2 * i] *= factor[t][i];
          out.x[t][j][2 * i + 1] *= factor[t][i];
        }
      }
    }
  }
};

// State of the rows that a thread holds. `scale` takes scores to exponents of 2, which are relative to `base`: the
// exponent of the maximum of the row, or so little less that no probability comes near an overflow. Following only
// large steps of the maximum leaves `out` and the sums as they are in almost every block. It costs float32 no
// precision. Probabilities of 16 bits are rounded, but for a 1, which each new maximum gets where the base follows it.
//
// An exponent is one multiply-add, fma(score, scale, -base). The rounding of the base is the same in every exponent of
// the row and cancels, as long as it is small against 1. Where scores are too large for that, a row is steep: its base
// is the maximum itself, which is subtracted from scores before they are scaled, and the sign of its sum says so.
// The base of a row that has seen no key is -infinity.
template <class element, int m_tiles>
struct Softmax {
  static constexpr float slack = 8.0f, steep = 1 << 22;

  // By how much maxima may exceed the base without `update` following them.
  static constexpr float lag = is_same<element, f32> ? slack : 0.0f;

  // The base is higher by `shift`, so that 2^16 keys do not overflow `out`, whatever finite numbers v holds.
  // Probabilities in float16 have no room for a shift, and float16 numbers no need of one; float32 needs every bit of
  // an exponent.
  static constexpr float shift = is_same<element, bf16> ? 24.0f : 0.0f;

  float base[m_tiles][2];
  // Sums over this thread's columns; the quad's lanes are added once, at the end. A steep row's is negative, or -0.
  float row_sum[m_tiles][2];
  float correction[2];  // factors that the last `follow` wants for its rows of `out`

  void init() {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
      base[t][0] = base[t][1] = -infinity;
      row_sum[t][0] = row_sum[t][1] = 0.0f;
    }
  }

  // The product is not to be contracted with an addition: an instruction takes one number from constant memory, and if
  // another number takes that place, `scale` is held in a register, whose port all instructions that read it compete
  // for.
  static float exponent_of(float score, float scale) { return __fmul_rn(score, scale); }

  static bool is_steep(float row_sum) { return __float_as_int(row_sum) < 0; }
  static float signed_sum(float sum, bool steep) { return steep ? -fabsf(sum) : fabsf(sum); }
  bool is_steep(int t, int i) const { return is_steep(row_sum[t][i]); }

  // The exponent, without shift, that a row's sums are relative to.
  static float top(float base, float row_sum, float scale) {
    return is_steep(row_sum) ? exponent_of(base, scale) : base - shift;
  }

  // How much higher the exponents are that the sums of a row are relative to than those of another part of the row; NaN
  // where neither has seen a key.
  static float higher(float base, float row_sum, float other_base, float other_sum, float scale) {
    return is_steep(row_sum) && is_steep(other_sum) ? (base - other_base) * scale
                                                    : top(base, row_sum, scale) - top(other_base, other_sum, scale);
  }

  // Takes in a block of scores, which become exponentials. The maxima of m-tile t follow where they exceed the old ones
  // by more than `lag`; then `out` is rescaled.
  template <int block_n, int out_cols>
  void update(tile::Accumulator<m_tiles, block_n>& scores, tile::Accumulator<m_tiles, out_cols>& out, float scale,
              int t) {
    const float over[2] = {lag, lag};
    const bool stepped = follow(scores, scale, over, t);
    exponentiate(scores, scale, t);
    if (__any_sync(0xffffffffu, stepped)) rescale(out, t);
  }

  // The maxima of rows that `accept` found `far` follow, by whatever they exceed the old ones. A row is far on all
  // lanes of a quad, afterwards, if it was on any. The caller then rescales `out` and exponentiates.
  template <int block_n>
  void follow_far(tile::Accumulator<m_tiles, block_n>& scores, float scale, bool (&far)[2]) {
    float over[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      far[i] = warp::quad_any(far[i]);
      over[i] = far[i] ? 0.0f : infinity;
    }
    follow(scores, scale, over, 0);
  }

  // The maxima of m-tile t follow where they exceed the old ones by more than `over`. The scores of steep rows become
  // relative to the rows' maxima. True if some maximum of the thread's rows followed.
  template <int block_n>
  bool follow(tile::Accumulator<m_tiles, block_n>& scores, float scale, const float (&over)[2], int t) {
    const float block_max[2] = {maximum(scores, t, 0), maximum(scores, t, 1)};
    bool stepped = false;
    // Each lane branches for itself: nothing waits for a vote.
    if (unlikely(is_or_gets_steep(block_max[0], scale, t, 0) | is_or_gets_steep(block_max[1], scale, t, 1))) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        step_steeply(block_max[i], scale, over[i], t, i);
        const float subtracted = is_steep(t, i) ? base[t][i] : 0.0f;
#pragma unroll
        for (int j = 0; j < block_n / 8; ++j) {
          scores.x[t][j][2 * i] -= subtracted;
          scores.x[t][j][2 * i + 1] -= subtracted;
        }
      }
      stepped = true;
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float exponent = exponent_of(block_max[i], scale);
        const bool step = exponent + shift > base[t][i] + over[i];
        step_to(exponent, step, t, i);
        stepped |= step;
      }
    }
    return stepped;
  }

  // The operators do not stop early, so that there is no branch.
  bool is_or_gets_steep(float block_max, float scale, int t, int i) const {
    return is_steep(t, i) | (fabsf(exponent_of(block_max, scale)) > steep & block_max > -infinity);
  }

  template <int block_n>
  static float maximum(const tile::Accumulator<m_tiles, block_n>& scores, int t, int i) {
    float even = scores.x[t][0][2 * i], odd = scores.x[t][0][2 * i + 1];  // two chains: a maximum has latency
#pragma unroll
    for (int j = 1; j < block_n / 8; ++j) {
      even = fmaxf(even, scores.x[t][j][2 * i]);
      odd = fmaxf(odd, scores.x[t][j][2 * i + 1]);
    }
    return warp::quad_max(fmaxf(even, odd));
  }

  // Steps to the maximum that has this exponent, if `step`; sets the row's correction.
  void step_to(float exponent, bool step, int t, int i) {
    const float old_base = base[t][i], new_base = exponent + shift;
    base[t][i] = step ? new_base : old_base;
    correction[i] = step ? ptx::ex2_approx_ftz(old_base - new_base) : 1.0f;
    row_sum[t][i] *= correction[i];
  }

  // Steps, in a row that may be steep or become so, to a maximum that exceeds the old one by more than `over`.
  void step_steeply(float block_max, float scale, float over, int t, int i) {
    // The maximum is at most the largest number: then a score of infinity has an infinite probability, not a NaN.
    const float new_max = fminf(block_max, largest_float), exponent = exponent_of(new_max, scale),
                old_base = base[t][i];
    const float higher = is_steep(t, i) ? (new_max - old_base) * scale : exponent + shift - old_base;
    const bool step = is_steep(t, i) ? higher > over : exponent + shift > old_base + over;  // as in `follow`
    correction[i] = step ? ptx::ex2_approx_ftz(-higher) : 1.0f;
    if (!step) return;
    const bool gets_steep = !(fabsf(exponent) <= steep);
    base[t][i] = gets_steep ? new_max : exponent + shift;
    row_sum[t][i] = signed_sum(row_sum[t][i] * correction[i], gets_steep);
  }

  template <int out_cols>
  void rescale(tile::Accumulator<m_tiles, out_cols>& out, int t = 0) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < out_cols / 8; ++j) {
        out.x[t][j][2 * i] *= correction[i];
        out.x[t][j][2 * i + 1] *= correction[i];
      }
    }
  }

  // scores ← exponentials, and their sums, once maxima have followed. A row that has seen no key subtracts 0, not
  // -infinity, which would give NaN.
  template <int block_n>
  void exponentiate(tile::Accumulator<m_tiles, block_n>& scores, float scale, int t = 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool relative = is_steep(t, i);
      float subtracted = base[t][i] == -infinity ? 0.0f : base[t][i];
      subtracted = relative ? shift : subtracted;
      float sum = fabsf(row_sum[t][i]);
#pragma unroll
      for (int j = 0; j < block_n / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& s = scores.x[t][j][2 * i + e];
          s = ptx::ex2_approx_ftz(fmaf(s, scale, -subtracted));
          sum += s;
        }
      }
      row_sum[t][i] = signed_sum(sum, relative);
    }
  }

  // p ← what `exponentiate` and packing give for steps [begin, end) of P·V, as long as `accept` then finds that the
  // base will do. Besides p only `sum` changes, which begins as row_sum. What is packed of a probability, which counts
  // to the sum as it is, is weight(row, column, probability), as far as weight.drop(packed, step) leaves it.
  template <int begin, int end, int block_n, class Weight>
  void exponentiate_at_once(tile::Operand<block_n>& p, const tile::Accumulator<1, block_n>& scores, float scale,
                            float (&sum)[2], Weight&& weight) const {
#pragma unroll
    for (int s = begin; s < end; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const pair = &scores.x[0][2 * s + i / 2][2 * (i % 2)];
        const float low = ptx::ex2_approx_ftz(fmaf(pair[0], scale, -base[0][i % 2]));
        const float high = ptx::ex2_approx_ftz(fmaf(pair[1], scale, -base[0][i % 2]));
        sum[i % 2] += low;
        sum[i % 2] += high;
        const int col = 8 * (2 * s + i / 2);
        p.x[s][i] = ptx::cvt_rn_x2<element>(weight(i % 2, col, low), weight(i % 2, col + 1, high));
      }
      weight.drop(p.x[s], s);
    }
  }

  // Whether `exponentiate_at_once` kept every exponential within bounds; else `far` says in which of the thread's rows
  // it did not. No maximum is sought: that the sums, needed anyway, stay small says that the base will do, as it does
  // in almost every block. The bound on what a thread adds bounds each of its probabilities too, and only a term above
  // 2^slack exceeds it. A row that has seen no key is far, since its sum is infinite or NaN, and so is a steep row.
  // What a row gets depends on the row alone: if it is not far, the path that seeks maxima gives it the same bits.
  template <int block_n>
  bool accept(const float (&sum)[2], bool (&far)[2]) {
    constexpr float bound = block_n / 4 * (1 << int(slack)), shifted = bound / (1 << int(shift));
    static_assert(bound < 65504.0f, "a float16 holds it");
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float limit = is_steep(0, i) ? not_a_number : row_sum[0][i] + shifted;  // known earlier than `sum`
      far[i] = !(sum[i] <= limit);
    }
    if (__any_sync(0xffffffffu, far[0] || far[1])) return false;
    row_sum[0][0] = sum[0];
    row_sum[0][1] = sum[1];
    return true;
  }

  // Gives finished rows that are steep a base like that of other rows, which is fit for `totals` and nothing else.
  void settle(float scale) {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        base[t][i] = settled(base[t][i], is_steep(t, i), scale);
        row_sum[t][i] = fabsf(row_sum[t][i]);
      }
    }
  }

  // The base of a finished row that is steep as that of other rows, which is fit for `total` and nothing else. It
  // is not copied: that took the fullest tiles two registers.
  static float settled(const float& base, bool steep, float scale) {
    return steep ? exponent_of(base, scale) + shift : base;
  }

  // The total of a settled row, whose sum over all lanes is keys_sum. sink is the score of a key without a value, if
  // there are `sinks`. Means are multiplied by `gain`. A row without keys gets out = 0 and lse = sink, or -infinity.
  template <bool sinks>
  static RowTotal total(float base, float keys_sum, float sink, float gain) {
    constexpr float unshifted = 1 << int(shift);
    const float sink_exponent = sink * log2_e, keys_base = base - shift;
    // Finite, so that an infinite sum or sink makes an infinite lse.
    const float new_base = fminf(sinks ? fmaxf(keys_base, sink_exponent) : keys_base, largest_float);
    const float subtracted = new_base == -infinity ? 0.0f : new_base;
    const float rescale = keys_sum == infinity ? 1.0f : ptx::ex2_approx_ftz(keys_base - subtracted);
    float sum = keys_sum * unshifted * rescale;
    if (sinks) sum += ptx::ex2_approx_ftz(sink_exponent - subtracted);
    return {sum == 0.0f ? 0.0f : rescale * ptx::rcp_approx_ftz(sum) * unshifted * gain,
            (subtracted + ptx::lg2_approx(sum)) * ln_2};
  }

  // The totals of rows that are settled.
  template <bool sinks>
  Totals<m_tiles> totals(float sink, float gain) const {
    Totals<m_tiles> totals;
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const RowTotal total = Softmax::total<sinks>(base[t][i], warp::quad_sum(row_sum[t][i]), sink, gain);
        totals.factor[t][i] = total.factor;
        totals.lse[t][i] = total.lse;
      }
    }
    return totals;
  }
};

}  // namespace attention
