// emulated: the tensor cores.
#include "numbers.h"
#include "state.h"

namespace emulated {
namespace {

// What a lane brings to a product.
struct Fragments {
  float (*d)[4];
  const u32 (*a)[4];
  u32 b[2];
};

// A row of a tile of 8 columns: one register of the host's, if it has such.
typedef double Row __attribute__((vector_size(64)));
typedef long long RowMask __attribute__((vector_size(64)));
typedef float FloatRow __attribute__((vector_size(32)));
typedef int IntRow __attribute__((vector_size(32)));

Row size_of(const Row& x) { return x < 0.0 ? -x : x; }

// The tensor cores add exact products up and round toward zero; what is beyond all numbers is infinite.
FloatRow toward_zero(const Row& x) {
  const FloatRow nearest = __builtin_convertvector(x, FloatRow);
  const Row size = size_of(x);
  const RowMask farther = (size_of(__builtin_convertvector(nearest, Row)) > size) & (size < 0x1p128);
  const IntRow bits = reinterpret_cast<IntRow>(nearest) + __builtin_convertvector(farther, IntRow);
  return reinterpret_cast<FloatRow>(nearest == nearest ? bits : IntRow{} + 0x7fffffff);
}

// Tiles as they are written down, from what each lane holds: `take` puts its parts of A and B into them. Lane l has
// rows l / 4 and l / 4 + 8, and columns 2 (l % 4) and the next, of the accumulator.
template <int depth, class Take>
void multiply(const Meeting& meeting, Take&& take) {
  Row d[16], b[depth];
  double a[16][depth];
  for (u32 lane = 0; lane < warp_size; ++lane) {
    const Fragments& own = *static_cast<const Fragments*>(meeting.slots[lane]);
    const u32 g = lane / 4, q = lane % 4;
    for (u32 i = 0; i < 4; ++i) d[g + i / 2 * 8][2 * q + i % 2] = (*own.d)[i];
    take(own, g, q, a, b);
  }
  FloatRow rounded[16];
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k) d[row] += a[row][k] * b[k];
    rounded[row] = toward_zero(d[row]);
  }
  for (u32 lane = 0; lane < warp_size; ++lane) {
    const Fragments& own = *static_cast<const Fragments*>(meeting.slots[lane]);
    const u32 g = lane / 4, q = lane % 4;
    for (u32 i = 0; i < 4; ++i) (*own.d)[i] = rounded[g + i / 2 * 8][2 * q + i % 2];
  }
}

// A: a0 is row g, columns 2 q and the next; a1 row g + 8; a2 and a3 the same 8 columns on. B: b0 is rows 2 q and the
// next, column g; b1 8 rows on.
template <class Convert>
void multiply_16_bits(const char* name, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Convert&& convert) {
  Fragments mine{&d, &a, {b0, b1}};
  together(name, 0xffffffffu, true, &mine, [convert](Meeting& meeting) {
    multiply<16>(meeting, [convert](const Fragments& own, u32 g, u32 q, double (&a)[16][16], Row(&b)[16]) {
      for (u32 i = 0; i < 4; ++i) {
        const u32 row = g + i % 2 * 8, k = 2 * q + i / 2 * 8;
        a[row][k] = convert(static_cast<u16>((*own.a)[i]));
        a[row][k + 1] = convert(static_cast<u16>((*own.a)[i] >> 16));
      }
      for (u32 i = 0; i < 2; ++i) {
        const u32 k = 2 * q + 8 * i;
        b[k][g] = convert(static_cast<u16>(own.b[i]));
        b[k + 1][g] = convert(static_cast<u16>(own.b[i] >> 16));
      }
    });
  });
}

}  // namespace

void mma_m16n8k16_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  multiply_16_bits("mma.m16n8k16.f16", d, a, b0, b1, [](u16 x) { return from_f16(x); });
}

void mma_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  multiply_16_bits("mma.m16n8k16.bf16", d, a, b0, b1, [](u16 x) { return from_bf16(x); });
}

// A: a0 is row g, column q; a1 row g + 8; a2 and a3 the same 4 columns on. B: b0 is row q, column g; b1 4 rows on. The
// lower 13 bits of an element are not looked at.
void mma_m16n8k8_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  Fragments mine{&d, &a, {b0, b1}};
  together("mma.m16n8k8.tf32", 0xffffffffu, true, &mine, [](Meeting& meeting) {
    const auto convert = [](u32 bits) { return float_of(bits & 0xffffe000u); };
    multiply<8>(meeting, [&](const Fragments& own, u32 g, u32 q, double (&a)[16][8], Row(&b)[8]) {
      for (u32 i = 0; i < 4; ++i) a[g + i % 2 * 8][q + i / 2 * 4] = convert((*own.a)[i]);
      for (u32 i = 0; i < 2; ++i) b[q + 4 * i][g] = convert(own.b[i]);
    });
  });
}

}  // namespace emulated
