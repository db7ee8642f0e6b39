// core: the words everything else is written in. Storage types carry bits only; conversions live in ptx/convert.cuh.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8 && sizeof(i64) == 8, "cufa assumes LP64");

struct f16 {
  u16 bits;
};

struct bf16 {
  u16 bits;
};

// float8 with 4 bits of exponent: no infinity, and one NaN of each sign.
struct e4m3 {
  u8 bits;
};

using f32 = float;

template <class A, class B>
inline constexpr bool is_same = false;
template <class A>
inline constexpr bool is_same<A, A> = true;

// A condition as a type, for what is compiled once for each.
template <bool condition>
struct Bool {
  static constexpr bool value = condition;
};

// One of two types.
template <bool first, class A, class B>
struct Choice {
  using Type = A;
};
template <class A, class B>
struct Choice<false, A, B> {
  using Type = B;
};
