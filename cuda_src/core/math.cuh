// core: integer helpers and the few constants of the softmax. No instruction is named here.
#pragma once

// Returns a condition that is seldom true: the code for it moves out of the way of the rest. `likely` is the opposite.
constexpr bool unlikely(bool condition) { return __builtin_expect(condition, false); }
constexpr bool likely(bool condition) { return __builtin_expect(condition, true); }

inline constexpr float log2_e = 1.4426950408889634f;
inline constexpr float ln_2 = 0.6931471805599453f;

// NVRTC defines no INFINITY.
inline constexpr float infinity = __builtin_bit_cast(float, 0x7f800000);
inline constexpr float not_a_number = __builtin_bit_cast(float, 0x7fffffff);
inline constexpr float largest_float = __builtin_bit_cast(float, 0x7f7fffff);

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

constexpr int min_of(int a, int b) { return a < b ? a : b; }

constexpr int max_of(int a, int b) { return a > b ? a : b; }

constexpr int clamp(int x, int low, int high) { return min_of(max_of(x, low), high); }

// A number of at most 1024 to divide others by that are less than 1024, in two instructions: a division by a number
// that the compiler does not know takes twenty, some of them slow.
struct SmallDivisor {
  int number, reciprocal;  // the latter ceil((1 << 20) / number)

  constexpr int quotient(int x) const { return unsigned(x) * unsigned(reciprocal) >> 20; }
  constexpr int remainder(int x) const { return x - quotient(x) * number; }
};

// A number to divide others by that are less than 2^31, of which the host has found the logarithm, rounded up, and
// ceil(2^(31 + shift) / number).
struct Divisor {
  int number, shift;
  unsigned reciprocal;

  constexpr int quotient(int x) const {
    return unsigned((unsigned long long)(2 * unsigned(x)) * reciprocal >> 32) >> shift;
  }
};

// The largest power of 2 that divides both.
constexpr int common_power_of_2(int a, int b) { return (a | b) & -(a | b); }
