// emulated: the tensor cores.
#include <cstring>

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

// --- wgmma ----------------------------------------------------------------------------------------------

namespace {

constexpr u32 unready = 0x7fff5a5a;  // NaN, which the registers of a product hold until it is waited for

// Where operands lie, as PTX's "Matrix Descriptor Format" and "Canonical Layouts" say: rows of 32, 64 or 128 bytes,
// whose chunks of 16 bytes the swizzle exchanges, eight of them together.
struct Descriptor {
  u32 start, leading, stride, row_bytes;
  bool transposed;

  Descriptor(u64 bits, bool transposed, u32 arena) : transposed(transposed) {
    start = arena + (bits & 0x3fff) * 16;
    leading = (bits >> 16 & 0x3fff) * 16;
    stride = (bits >> 32 & 0x3fff) * 16;
    const u32 swizzle = bits >> 62;
    row_bytes = swizzle ? 256 >> swizzle : 0;
  }

  // The address of 8 elements: of row `mn`, from column k on; or, transposed, of column k, from row mn on.
  u32 chunk(u32 mn, u32 k) const {
    const u32 row = transposed ? k : mn, byte = 2 * (transposed ? mn : k);
    const u32 panels = transposed ? byte / row_bytes * leading : 0, within = transposed ? byte % row_bytes : byte;
    const u32 address = start + panels + row / 8 * stride + row % 8 * row_bytes + within;
    return address ^ (address >> 7 & (row_bytes / 16 - 1)) << 4;
  }

  // Calls each(mn, k, address) for every chunk of so many rows and 16 columns.
  template <class Each>
  void for_chunks(u32 rows, Each&& each) const {
    for (u32 mn = 0; mn < rows; mn += transposed ? 8 : 1) {
      for (u32 k = 0; k < 16; k += transposed ? 1 : 8) each(mn, k, chunk(mn, k));
    }
  }

  // Calls each(mn, k, element).
  template <class Each>
  void for_elements(u32 rows, Each&& each) const {
    for_chunks(rows, [&](u32 mn, u32 k, u32 address) {
      u16 x[8];
      std::memcpy(x, pointer_of(address), sizeof(x));
      for (u32 i = 0; i < 8; ++i) each(mn + (transposed ? i : 0), k + (transposed ? 0 : i), x[i]);
    });
  }
};

u32 arena_of(const Block& block) { return static_cast<u32>(reinterpret_cast<Address>(block.arena)); }

void compute(const Product& product, u32 arena) {
  const Wgmma& what = product.what;
  const u32 tiles = what.columns / 8;
  static Row b[16][32];
  static double a[64][16];
  const auto convert = [&](u16 x) { return what.is_bf16 ? from_bf16(x) : from_f16(x); };
  Descriptor(what.b, what.transposed, arena).for_elements(what.columns, [&](u32 n, u32 k, u16 x) {
    b[k][n / 8][n % 8] = convert(x);
  });
  if (!what.from_registers) {
    Descriptor(what.a, what.transposed, arena).for_elements(64, [&](u32 m, u32 k, u16 x) { a[m][k] = convert(x); });
  }
  for (u32 warp = 0; warp < 4; ++warp) {
    const WgmmaPart& part = product.parts[warp];
    for (u32 lane = 0; what.from_registers && lane < warp_size; ++lane) {
      for (u32 i = 0; i < 4; ++i) {
        double* const to = a[16 * warp + lane / 4 + i % 2 * 8] + 2 * (lane % 4) + i / 2 * 8;
        to[0] = convert(static_cast<u16>(part.a[lane][i]));
        to[1] = convert(static_cast<u16>(part.a[lane][i] >> 16));
      }
    }
    for (u32 row = 0; row < 16; ++row) {
      for (u32 tile = 0; tile < tiles; ++tile) {
        float* const to = part.d->x.data() + row * what.columns + tile * 8;
        FloatRow d;
        std::memcpy(&d, to, sizeof(d));
        Row sum = what.accumulate ? __builtin_convertvector(d, Row) : Row{};
        for (u32 k = 0; k < 16; ++k) sum += a[16 * warp + row][k] * b[k][tile];
        d = toward_zero(sum);
        std::memcpy(to, &d, sizeof(d));
      }
    }
  }
}

// What is in shared memory is read on behalf of all four warps, which have to know that it is there.
void note_reads(Block& block, u32 warpgroup, const Product& product, u64 number, Address frame) {
  const Wgmma& what = product.what;
  const Agent cores{agent_of_products(warpgroup), static_cast<u32>(number), product.clock, nullptr, what.name};
  const auto note = [&](u64 bits, u32 rows) {
    const Descriptor at(bits, what.transposed, arena_of(block));
    if (!at.row_bytes) fail(frame, "%s: a descriptor without a swizzle is not emulated", what.name);
    at.for_chunks(rows, [&](u32, u32, u32 address) {
      access_by(cores, offset_of(address, 16, what.name, frame), 16, false, product.pc, frame);
    });
  };
  note(what.b, what.columns);
  if (!what.from_registers) note(what.a, 64);
}

// What a lane brings to a wgmma.
struct WgmmaLane {
  float* d;
  const u32* a;
  Wgmma what;
};

WgmmaLane& lane_of(const Meeting& meeting, u32 lane) { return *static_cast<WgmmaLane*>(meeting.slots[lane]); }

// Calls each(register, entry) for what the lanes hold of an accumulator.
template <class Each>
void for_registers(Accumulator& d, Each&& each) {
  const u32 columns = d.x.size() / 16;
  for (u32 lane = 0; lane < warp_size; ++lane) {
    for (u32 i = 0; i < columns / 2; ++i) {
      const u32 row = lane / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      each(d.at[lane][i], d.x[row * columns + col]);
    }
  }
}

bool operator==(const Wgmma& x, const Wgmma& y) {
  return x.name == y.name && x.from_registers == y.from_registers && x.transposed == y.transposed &&
         x.accumulate == y.accumulate && x.columns == y.columns && x.a == y.a && x.b == y.b;
}

// The accumulator whose registers these are, which is in flight from now on.
Accumulator& accumulator_of(Warp& warp, const Meeting& meeting, u32 columns) {
  for (Accumulator& d : warp.accumulators) {
    if (d.at[0] == lane_of(meeting, 0).d && d.x.size() == 16 * columns) return d;
  }
  warp.accumulators.emplace_back();
  Accumulator& d = warp.accumulators.back();
  d.x.resize(16 * columns);
  for (u32 lane = 0; lane < warp_size; ++lane) d.at[lane] = lane_of(meeting, lane).d;
  for_registers(d, [](float& its, float& x) {
    x = its;
    its = float_of(unready);
  });
  return d;
}

void give_to_tensor_cores(const Meeting& meeting, Address pc, Address frame) {
  Warp& warp = *current->warp;
  Block& block = *warp.block;
  const u32 index = warp.index / 4;
  Warpgroup& warpgroup = block.warpgroups[index];
  const Wgmma& what = lane_of(meeting, 0).what;
  if (!warp.fenced) fail(frame, "%s: no wgmma.fence has come behind what has touched registers", what.name);
  const u64 number = warp.products++;
  if (number == warpgroup.first + warpgroup.products.size()) {
    warpgroup.products.push_back({});
    warpgroup.products.back().what = what;
    warpgroup.products.back().pc = pc;
  }
  Product& product = warpgroup.products[number - warpgroup.first];
  WgmmaPart& part = product.parts[warp.index % 4];
  part.d = &accumulator_of(warp, meeting, what.columns);
  part.d->last = number + 1;
  Clock clock;
  for (u32 lane = 0; lane < warp_size; ++lane) {
    const WgmmaLane& its = lane_of(meeting, lane);
    if (!(its.what == product.what)) {
      fail(frame, "%s: warps of a warpgroup, or lanes of a warp, give different products to the tensor cores",
           what.name);
    }
    part.at[lane] = its.a;
    if (its.a) std::memcpy(part.a[lane], its.a, sizeof(part.a[lane]));
    join(clock, warp.threads[lane].clock);
  }
  // What lanes have written themselves is theirs to fence.
  std::vector<Arrival> own;
  for_lanes(warp.live,
            [&](u32 lane) { own.push_back({warp.threads[lane].number, warp.time, warp.threads[lane].fenced}); });
  learn(clock, own);
  product.clock = product.warps ? common(product.clock, clock) : clock;
  if (++product.warps < 4) return;
  note_reads(block, index, product, number + 1, frame);
  ++warpgroup.issued;
  if (one_in(2)) multiply(block, warpgroup, warpgroup.issued);
  for (u32 i = 0; i < 4; ++i) {
    Warp& other = block.warps[4 * index + i];
    make_ready(other, other.waiting_for_products);
    other.waiting_for_products = 0;
  }
  bring_news();
}

// The first wgmmas, up to `end`, are done: the warp's registers hold what comes of them.
void take_products(Warp& warp, Warpgroup& warpgroup, u64 end, Address frame) {
  Block& block = *warp.block;
  multiply(block, warpgroup, end);
  for (; warp.waited < end; ++warp.waited) {
    const WgmmaPart& part = warpgroup.products[warp.waited - warpgroup.first].parts[warp.index % 4];
    for (u32 lane = 0; lane < warp_size; ++lane) {
      if (!part.at[lane] || !std::memcmp(part.a[lane], part.at[lane], sizeof(part.a[lane]))) continue;
      fail(frame, "wgmma: a register of A has changed before the product was waited for");
    }
  }
  for (auto d = warp.accumulators.begin(); d != warp.accumulators.end();) {
    if (d->last > end) {
      ++d;
      continue;
    }
    for_registers(*d, [&](float& its, float& x) {
      if (bits_of(its) != unready) fail(frame, "wgmma: a register of D has changed before the product was waited for");
      its = x;
    });
    d = warp.accumulators.erase(d);
  }
  u64 least = end;
  for (u32 i = 0; i < 4; ++i) {
    const u64 waited = block.warps[warp.index / 4 * 4 + i].waited;
    if (waited < least) least = waited;
  }
  for (; warpgroup.first < least; ++warpgroup.first) warpgroup.products.pop_front();
  learn(warp.ready_products, agent_of_products(warp.index / 4), static_cast<u32>(end));
}

}  // namespace

void multiply(Block& block, Warpgroup& warpgroup, u64 end) {
  for (; warpgroup.done < end; ++warpgroup.done) {
    compute(warpgroup.products[warpgroup.done - warpgroup.first], arena_of(block));
  }
}

void wgmma(float* d, const u32* a, const Wgmma& what) {
  WgmmaLane mine{d, a, what};
  const Address pc = HERE, frame = FRAME;
  together(what.name, 0xffffffffu, true, &mine, [&](Meeting& meeting) { give_to_tensor_cores(meeting, pc, frame); });
}

void wgmma_fence() {
  together("wgmma.fence", 0xffffffffu, true, nullptr, [](Meeting&) { current->warp->fenced = true; });
}

void wgmma_commit_group() {
  together("wgmma.commit_group", 0xffffffffu, true, nullptr,
           [](Meeting&) { current->warp->groups.push_back(current->warp->products); });
}

void wgmma_wait_group(u32 pending) {
  Thread& me = *current;
  Warp& warp = *me.warp;
  Warpgroup& warpgroup = me.block->warpgroups[warp.index / 4];
  together("wgmma.wait_group", 0xffffffffu, true, nullptr, [&](Meeting&) {
    warp.wanted_products = warp.waited;
    while (warp.groups.size() > pending) {
      warp.wanted_products = warp.groups.front();
      warp.groups.pop_front();
    }
    warp.fenced = false;
  });
  while (warpgroup.issued < warp.wanted_products) {
    warp.waiting_for_products |= 1u << me.lane;
    me.waits = "wgmmas that other warps have not come to";
    make_wait(warp, 1u << me.lane);
    pause();
    me.waits = nullptr;
  }
  take_products(warp, warpgroup, warp.wanted_products, FRAME);
  me.clock.known = join(me.clock.known, warp.ready_products);
}

}  // namespace emulated
