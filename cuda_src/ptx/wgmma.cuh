// ptx: warpgroup-wide matrix multiply-accumulate (PTX ISA: "wgmma"), sm_90a: D (64 rows, float32) += A · B,
// asynchronously. Warp w of the group holds rows 16 w .. 16 w + 15 of D, in the layout of mma.m16n8; d[j] is columns 8
// j .. 8 j + 7.
//
// B comes from shared memory through a descriptor, A from there or from registers in the layout of mma.m16n8k16's A.
// Between a wgmma and the wait for its group, neither D nor A in registers may be touched.
#pragma once

#include "core/types.cuh"

namespace ptx {

// Orders this warp's earlier accesses of registers before the wgmmas that follow.
inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

inline void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `pending` of the committed groups are still running.
template <int pending>
inline void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Ties a register to this point of the program: the compiler knows nothing of the asynchronous writes.
inline void hold(float& x) { asm volatile("" : "+f"(x)::"memory"); }
inline void hold(u32& x) { asm volatile("" : "+r"(x)::"memory"); }

// Whether products, and what they need, are begun also where nobody takes what comes of them: a branch around them
// would make the compiler wait for all that run.
inline constexpr bool in_vain = true;

// Operands of D, eight registers (16 columns) at a time: their numbers in the text of the instruction, and the
// registers that they are bound to.
#define CUFA_D16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define CUFA_D32 CUFA_D16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define CUFA_D48 CUFA_D32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define CUFA_D64 CUFA_D48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define CUFA_D80 CUFA_D64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define CUFA_D96 CUFA_D80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define CUFA_D112 CUFA_D96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define CUFA_D128 CUFA_D112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define CUFA_D144 CUFA_D128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define CUFA_D160 CUFA_D144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define CUFA_D176 CUFA_D160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define CUFA_D192 CUFA_D176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define CUFA_D208 CUFA_D192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define CUFA_D224 CUFA_D208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define CUFA_D240 CUFA_D224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define CUFA_D256 CUFA_D240 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define CUFA_BIND16(j)                                                                                                 \
  "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3]), "+f"(d[j + 1][0]), "+f"(d[j + 1][1]), "+f"(d[j + 1][2]), \
      "+f"(d[j + 1][3])
#define CUFA_BIND_D16 CUFA_BIND16(0)
#define CUFA_BIND_D32 CUFA_BIND_D16, CUFA_BIND16(2)
#define CUFA_BIND_D48 CUFA_BIND_D32, CUFA_BIND16(4)
#define CUFA_BIND_D64 CUFA_BIND_D48, CUFA_BIND16(6)
#define CUFA_BIND_D80 CUFA_BIND_D64, CUFA_BIND16(8)
#define CUFA_BIND_D96 CUFA_BIND_D80, CUFA_BIND16(10)
#define CUFA_BIND_D112 CUFA_BIND_D96, CUFA_BIND16(12)
#define CUFA_BIND_D128 CUFA_BIND_D112, CUFA_BIND16(14)
#define CUFA_BIND_D144 CUFA_BIND_D128, CUFA_BIND16(16)
#define CUFA_BIND_D160 CUFA_BIND_D144, CUFA_BIND16(18)
#define CUFA_BIND_D176 CUFA_BIND_D160, CUFA_BIND16(20)
#define CUFA_BIND_D192 CUFA_BIND_D176, CUFA_BIND16(22)
#define CUFA_BIND_D208 CUFA_BIND_D192, CUFA_BIND16(24)
#define CUFA_BIND_D224 CUFA_BIND_D208, CUFA_BIND16(26)
#define CUFA_BIND_D240 CUFA_BIND_D224, CUFA_BIND16(28)
#define CUFA_BIND_D256 CUFA_BIND_D240, CUFA_BIND16(30)

// n, and the numbers of the seven operands that follow those of D.
#define CUFA_WGMMA_SHAPES(X, type)                \
  X(type, 16, 8, 9, 10, 11, 12, 13, 14)           \
  X(type, 32, 16, 17, 18, 19, 20, 21, 22)         \
  X(type, 48, 24, 25, 26, 27, 28, 29, 30)         \
  X(type, 64, 32, 33, 34, 35, 36, 37, 38)         \
  X(type, 80, 40, 41, 42, 43, 44, 45, 46)         \
  X(type, 96, 48, 49, 50, 51, 52, 53, 54)         \
  X(type, 112, 56, 57, 58, 59, 60, 61, 62)        \
  X(type, 128, 64, 65, 66, 67, 68, 69, 70)        \
  X(type, 144, 72, 73, 74, 75, 76, 77, 78)        \
  X(type, 160, 80, 81, 82, 83, 84, 85, 86)        \
  X(type, 176, 88, 89, 90, 91, 92, 93, 94)        \
  X(type, 192, 96, 97, 98, 99, 100, 101, 102)     \
  X(type, 208, 104, 105, 106, 107, 108, 109, 110) \
  X(type, 224, 112, 113, 114, 115, 116, 117, 118) \
  X(type, 240, 120, 121, 122, 123, 124, 125, 126) \
  X(type, 256, 128, 129, 130, 131, 132, 133, 134)

#define CUFA_WGMMA_SS(type, n, o0, o1, o2, o3, ...)                                               \
  if constexpr (columns == n) {                                                                   \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #o2                       \
                 ", 0;\n"                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {" CUFA_D##n \
                 "}, %" #o0 ", %" #o1 ", accumulate, 1, 1, %" #o3 ", %" #o3 ";\n}"                \
                 : CUFA_BIND_D##n                                                                 \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(transposed)));                   \
  }

#define CUFA_WGMMA_RS(type, n, o0, o1, o2, o3, o4, o5, o6)                                                          \
  if constexpr (columns == n) {                                                                                     \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #o5                                         \
                 ", 0;\n"                                                                                           \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {" CUFA_D##n                   \
                 "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", accumulate, 1, 1, %" #o6 ";\n}"            \
                 : CUFA_BIND_D##n                                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(transposed))); \
  }

// The wgmma of kind X for `element` and `columns`.
#define CUFA_WGMMA(X)                                                                       \
  static_assert(columns % 16 == 0 && columns <= 256, "a wgmma has 16 to 256 columns here"); \
  if constexpr (is_same<element, bf16>) {                                                   \
    CUFA_WGMMA_SHAPES(X, bf16)                                                              \
  } else {                                                                                  \
    static_assert(is_same<element, f16>, "wgmma here takes f16 or bf16");                   \
    CUFA_WGMMA_SHAPES(X, f16)                                                               \
  }

// D = A · B, or D += A · B if `accumulate`. Both come from shared memory, with k running along their rows (K-major),
// or, `transposed`, down their columns (MN-major).
template <class element, bool transposed, int n_tiles>
inline void wgmma_ss(float (&d)[n_tiles][4], u64 a, u64 b, bool accumulate) {
  constexpr int columns = 8 * n_tiles;
  CUFA_WGMMA(CUFA_WGMMA_SS)
}

// The same with A from registers.
template <class element, bool transposed, int n_tiles>
inline void wgmma_rs(float (&d)[n_tiles][4], const u32 (&a)[4], u64 b, bool accumulate) {
  constexpr int columns = 8 * n_tiles;
  CUFA_WGMMA(CUFA_WGMMA_RS)
}

}  // namespace ptx
