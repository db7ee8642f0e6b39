// ptx: transposing a matrix in the registers of a warp (PTX ISA: "movmatrix").
#pragma once

#include "core/types.cuh"

namespace ptx {

// The transpose of a matrix of 8×8 numbers of 16 bits, of which lane l holds row l / 4, columns 2 (l % 4) and the next.
// All lanes execute this together.
inline u32 movmatrix_trans(u32 x) {
  u32 transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(x));
  return transposed;
}

}  // namespace ptx
