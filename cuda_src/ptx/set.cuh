// ptx: comparisons of two 16-bit elements at a time (PTX ISA: "set").
#pragma once

#include "core/types.cuh"

namespace ptx {

// All bits of each half where |a| < b as float16. Numbers of 15 bits compare as float16 as they do as integers, up to
// 0x7c00, and larger ones, which are NaN, are less than none: so this compares the low 15 bits of a with b <= 0x7c00.
inline u32 set_abs_lt_f16x2(u32 a, u32 b) {
  u32 mask;
  asm("{.reg .b32 t; abs.f16x2 t, %1; set.lt.u32.f16x2 %0, t, %2;}" : "=r"(mask) : "r"(a), "r"(b));
  return mask;
}

}  // namespace ptx
