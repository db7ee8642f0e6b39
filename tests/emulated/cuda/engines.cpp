// emulated: Hopper's copy engine, mbarriers, and what moves registers between warpgroups.
//
// A copy happens at once, or at some time before somebody could know that it has: when that is does not decide on what
// is seen. What it writes belongs to it from when it is asked for until who touches it knows of its completion, and
// what it reads until then must not be written.
#include <cstring>

#include "numbers.h"
#include "state.h"

namespace emulated {
namespace {

constexpr u32 load_odds = 2;  // one in so many copies happens at once

u32 warpgroups_of(u32 threads) { return (threads + 127) / 128; }

Mbarrier& mbarrier_of(u32 address, const char* name, Address frame, u32* index = nullptr) {
  const Thread& me = *current;
  const u32 offset = offset_of(address, 8, name, frame), found = me.block->mbarrier_at[offset / 8];
  if (!found) fail(frame, "%s: there is no mbarrier at address %x", name, address);
  Mbarrier& barrier = me.block->mbarriers[found - 1];
  if (barrier.thread != me.number && time_of(me.clock.known, barrier.thread) < barrier.time) {
    fail(frame, "a race: %s of an mbarrier, which another thread has made without a barrier between", name);
  }
  if (index) *index = found - 1;
  return barrier;
}

// Begins the next phase if nothing is left to come in this one.
void maybe_complete(Block& block, u32 index) {
  Mbarrier& barrier = block.mbarriers[index];
  if (barrier.pending || barrier.bytes) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  join(barrier.done, barrier.clock);
  barrier.arrivals.push_back({agent_of_mbarrier(index), barrier.phase, 0});
  learn(barrier.done, barrier.arrivals);
  barrier.arrivals.clear();
  barrier.clock = {};
  for (Warp& warp : block.warps) {
    u32& waiting = barrier.waiting[warp.index];
    make_ready(warp, waiting);
    waiting = 0;
  }
  bring_news();
}

void arrive_at(u32 address, u32 bytes, const char* name, Address frame) {
  Thread& me = *current;
  u32 index;
  Mbarrier& barrier = mbarrier_of(address, name, frame, &index);
  if (!barrier.pending) fail(frame, "%s: more than %u threads come to an mbarrier", name, barrier.count);
  join(barrier.clock, me.clock);
  barrier.arrivals.push_back(arrive(me));
  barrier.bytes += bytes;
  --barrier.pending;
  maybe_complete(*me.block, index);
  maybe_yield(warp_odds);
}

void complete(Block& block, const BulkLoad& load) {
  for (const Piece& piece : load.pieces) {
    char* const to = pointer_of(piece.destination);
    if (piece.valid) std::memcpy(to, piece.source, piece.valid);
    std::memset(to + piece.valid, 0, piece.bytes - piece.valid);
  }
  Mbarrier& barrier = block.mbarriers[load.mbarrier];
  if (barrier.phase != load.phase) {
    say("an mbarrier has not waited for all bytes of a copy: fewer are expected than come");
    std::fprintf(stderr, "of: the copy, of block %u\nat %lx\n", block.index, static_cast<unsigned long>(load.pc));
    quit();
  }
  barrier.bytes -= load.bytes;
  maybe_complete(block, load.mbarrier);
}

// Completes a copy at once, or some time.
void begin(Block& block, BulkLoad load) {
  if (one_in(load_odds))
    complete(block, load);
  else
    block.loads.push_back(std::move(load));
  maybe_yield(warp_odds);
}

// Lets the copy engine write pieces, which are of so many bytes together.
void load(std::vector<Piece> pieces, u32 bytes, u32 address, const char* name, Address pc, Address frame) {
  Thread& me = *current;
  Block& block = *me.block;
  u32 index;
  const Mbarrier& barrier = mbarrier_of(address, name, frame, &index);
  if (!barrier.fenced) fail(frame, "%s: no fence.mbarrier_init has come behind the mbarrier's making", name);
  const Agent engine{agent_of_mbarrier(index), barrier.phase + 1, me.clock, &me, name};
  for (const Piece& piece : pieces) {
    if (piece.valid) read_by(name, reinterpret_cast<Address>(piece.source), piece.valid, pc, frame);
    access_by(engine, offset_of(piece.destination, 16, name, frame), piece.bytes, true, pc, frame);
  }
  BulkLoad load{std::move(pieces), {}, bytes, index, barrier.phase, pc};
  begin(block, std::move(load));
}

// A tensor map, as Gpu in gpu.py makes them.
struct Tensor {
  Address address;
  u32 rank, element, swizzle;  // bytes of an element, and of the rows that the swizzle is for
  u32 box[5], extents[5];
  u32 unused;
  u64 strides[4];  // in bytes, of all axes but the first
};
static_assert(sizeof(Tensor) <= 128);

// The swizzle exchanges the 16-byte chunks of an address by the 128-byte rows it lies in.
u32 swizzled(u32 address, u32 row_bytes) { return address ^ (address >> 7 & (row_bytes / 16 - 1)) << 4; }

}  // namespace

u32 agent_of_mbarrier(u32 index) { return launch->threads + index; }
u32 agent_of_products(u32 warpgroup) { return launch->threads + max_mbarriers + warpgroup; }
u32 agent_of_reads(u32 storing) { return launch->threads + max_mbarriers + max_warpgroups + 2 * storing; }
u32 agent_of_writes(u32 storing) { return agent_of_reads(storing) + 1; }

void begin_engines(Block& block) {
  const u32 each = registers / launch->threads / 8 * 8, most = each < 255 ? each : 255;
  block.mbarriers.clear();
  block.mbarrier_at.assign(block.cells.size() / 2 + 1, 0);
  block.loads.clear();
  block.storing = block.wanting = 0;
  block.free_registers = registers - most * launch->threads;
  for (u32 i = 0; i < warpgroups_of(launch->threads); ++i) block.warpgroups[i] = {};
  for (Warp& warp : block.warps) {
    warp.registers = most;
    warp.products = warp.waited = warp.wanted_products = 0;
    warp.waiting_for_products = 0;
    warp.groups.clear();
    warp.accumulators.clear();
    warp.ready_products = {};
    warp.fenced = false;
  }
}

void end_engines(Thread& thread) {
  Block& block = *thread.block;
  if (!thread.bulk.empty()) {
    say("a thread ends, but its bulk copies may still read shared memory: it has not waited for them");
    say_current(thread.bulk[0].pc, 0);
    quit();
  }
  if (!thread.warp->accumulators.empty()) FAIL("a thread ends, but has not waited for its wgmmas");
  if (block.live > 1 || block.loads.empty()) return;
  say("a block ends, but copies to its shared memory are on their way");
  std::fprintf(stderr, "of: one of them, of block %u\nat %lx\n", block.index,
               static_cast<unsigned long>(block.loads[0].pc));
  quit();
}

// --- mbarriers ------------------------------------------------------------------------------------------

void mbarrier_init(u32 address, u32 arrivals) {
  Thread& me = *current;
  Block& block = *me.block;
  u8& at = block.mbarrier_at[offset_of(address, 8, "mbarrier.init", FRAME) / 8];
  if (at || block.mbarriers.size() == max_mbarriers) FAIL("mbarrier.init: the mbarrier is there, or is one too many");
  if (!arrivals) FAIL("mbarrier.init: nobody is to come");
  const u64 nothing = 0;
  st_shared(address, &nothing, sizeof(nothing));
  block.mbarriers.push_back({});
  Mbarrier& barrier = block.mbarriers.back();
  barrier.count = barrier.pending = arrivals;
  barrier.thread = me.number;
  barrier.time = me.warp->time;
  at = block.mbarriers.size();
}

void fence_mbarrier_init() {
  for (Mbarrier& barrier : current->block->mbarriers) {
    if (barrier.thread == current->number) barrier.fenced = true;
  }
}

void mbarrier_arrive(u32 address) { arrive_at(address, 0, "mbarrier.arrive", FRAME); }

void mbarrier_arrive_expect_tx(u32 address, u32 bytes) {
  arrive_at(address, bytes, "mbarrier.arrive.expect_tx", FRAME);
}

bool mbarrier_try_wait_parity(u32 address, u32 parity) {
  Thread& me = *current;
  if (parity > 1) FAIL("mbarrier.try_wait: %u is no parity", parity);
  while (true) {
    Mbarrier& barrier = mbarrier_of(address, "mbarrier.try_wait", FRAME);
    if (barrier.phase % 2 != parity) {
      join(me.clock, barrier.done);
      maybe_yield(warp_odds);
      return true;
    }
    barrier.waiting[me.warp->index] |= 1u << me.lane;
    me.waits = "an mbarrier";
    make_wait(*me.warp, 1u << me.lane);
    pause();
    me.waits = nullptr;
  }
}

bool mbarrier_test_wait_parity(u32 address, u32 parity) {
  Thread& me = *current;
  if (parity > 1) FAIL("mbarrier.test_wait: %u is no parity", parity);
  maybe_yield(warp_odds);
  Mbarrier& barrier = mbarrier_of(address, "mbarrier.test_wait", FRAME);
  if (barrier.phase % 2 == parity) return false;
  join(me.clock, barrier.done);
  return true;
}

// --- copies to shared memory ----------------------------------------------------------------------------

bool complete_load(Block& block) {
  if (block.loads.empty()) return false;
  std::swap(block.loads[random_below(block.loads.size())], block.loads.back());
  const BulkLoad load = std::move(block.loads.back());
  block.loads.pop_back();
  complete(block, load);
  return true;
}

void bulk_load(u32 destination, const void* source, u32 bytes, u32 mbarrier) {
  const Address from = reinterpret_cast<Address>(source);
  if (from % 16 || bytes % 16) FAIL("cp.async.bulk: %u bytes from %lx are no multiples of 16", bytes, from);
  load({{destination, bytes, bytes, static_cast<const char*>(source)}}, bytes, mbarrier, "cp.async.bulk", HERE, FRAME);
}

u32 mapa(u32 address, u32 rank) {
  const u32 offset = offset_of(address, 1, "mapa", FRAME);
  const Cluster& cluster = *current->block->cluster;
  if (rank >= cluster.blocks.size()) FAIL("mapa: there is no block %u in the cluster", rank);
  return static_cast<u32>(reinterpret_cast<Address>(cluster.blocks[rank]->arena)) + offset;
}

void st_async(u32 address, const void* from, u32 bytes, u32 mbarrier) {
  const char* const name = "st.async";
  Thread& me = *current;
  const Cluster& cluster = *me.block->cluster;
  if (launch->cluster == 1) FAIL("%s: the launch has no clusters", name);
  const auto offset_in = [](const Block& block, u32 at) {
    return at - static_cast<u32>(reinterpret_cast<Address>(block.arena));
  };
  Block* owner = nullptr;
  for (Block* block : cluster.blocks) {
    if (offset_in(*block, address) < arena_bytes && offset_in(*block, mbarrier) < arena_bytes) owner = block;
  }
  if (!owner) FAIL("%s: %x and %x are no addresses of the same block of the cluster", name, address, mbarrier);
  if (address % bytes || mbarrier % 8) FAIL("%s: address %x or %x is not aligned", name, address, mbarrier);
  if (cluster.phase == 1) {
    FAIL("%s: no barrier of the cluster says that block %u, whose memory it is, has begun", name, owner->index);
  }
  if (owner->live == 0) FAIL("%s: block %u, whose memory it is, has ended", name, owner->index);
  const u32 found = owner->mbarrier_at[offset_in(*owner, mbarrier) / 8];
  if (!found) FAIL("%s: there is no mbarrier at address %x", name, mbarrier);
  const Mbarrier& barrier = owner->mbarriers[found - 1];
  if (!barrier.fenced) FAIL("%s: no fence.mbarrier_init has come behind the mbarrier's making", name);
  const Agent engine{agent_of_mbarrier(found - 1), barrier.phase + 1, me.clock, nullptr, name};
  store_by(*owner, engine, offset_in(*owner, address), bytes, HERE, FRAME);
  BulkLoad store{{}, std::vector<u32>(bytes / 4), bytes, found - 1, barrier.phase, HERE};
  std::memcpy(store.words.data(), from, bytes);
  store.pieces = {{address, bytes, bytes, reinterpret_cast<const char*>(store.words.data())}};
  begin(*owner, std::move(store));
}

// Element by element of the box the innermost coordinate changes first; each row of the box has as many bytes as the
// swizzle is for. Whatever is outside of the tensor is zero.
void tensor_load(u32 destination, const void* map, u32 mbarrier, const i32* at, u32 rank) {
  Tensor tensor;
  std::memcpy(&tensor, map, sizeof(tensor));
  const char* const name = "cp.async.bulk.tensor";
  if (tensor.rank != rank) FAIL("%s: a map of %u axes is used as one of %u", name, tensor.rank, rank);
  if (destination % 128) FAIL("%s: address %x is no multiple of 128", name, destination);
  const u32 row_bytes = tensor.box[0] * tensor.element;
  u32 rows = 1;
  for (u32 i = 1; i < rank; ++i) rows *= tensor.box[i];
  std::vector<Piece> pieces;
  for (u32 row = 0; row < rows; ++row) {
    bool inside = true;
    Address from = tensor.address;
    for (u32 i = 1, rest = row; i < rank; ++i) {
      const long place = static_cast<long>(at[i]) + rest % tensor.box[i];
      rest /= tensor.box[i];
      inside &= place >= 0 && place < static_cast<long>(tensor.extents[i]);
      from += place * tensor.strides[i - 1];
    }
    for (u32 byte = 0; byte < row_bytes; byte += 16) {
      const long begin = static_cast<long>(at[0]) * tensor.element + byte;
      const long left = static_cast<long>(tensor.extents[0]) * tensor.element - begin;
      if (begin < 0) FAIL("%s: boxes that begin before the first column are not emulated", name);
      const u32 valid = !inside || left < 0 ? 0 : left < 16 ? left : 16;
      pieces.push_back({swizzled(destination + row * row_bytes + byte, tensor.swizzle), 16, valid,
                        reinterpret_cast<const char*>(from + begin)});
    }
  }
  load(std::move(pieces), rows * row_bytes, mbarrier, name, HERE, FRAME);
}

// --- copies from shared memory --------------------------------------------------------------------------

namespace {

void complete(const BulkStore& store) {
  const char* const from = pointer_of(store.source);
  if (!store.adds) {
    std::memcpy(store.destination, from, store.bytes);
    return;
  }
  for (u32 i = 0; i < store.bytes; i += sizeof(float)) {
    float sum, x;
    std::memcpy(&sum, store.destination + i, sizeof(sum));
    std::memcpy(&x, from + i, sizeof(x));
    sum = canonical(sum + x);
    std::memcpy(store.destination + i, &sum, sizeof(sum));
  }
}

}  // namespace

void bulk_store(void* destination, u32 source, u32 bytes, bool adds) {
  Thread& me = *current;
  const char* const name = adds ? "cp.reduce.async.bulk" : "cp.async.bulk";
  const Address to = reinterpret_cast<Address>(destination);
  if (to % 16 || bytes % 16) FAIL("%s: %u bytes to %lx are no multiples of 16", name, bytes, to);
  if (!me.storing) {
    if (me.block->storing == max_storing) FAIL("%s: too many threads copy from shared memory", name);
    me.storing = ++me.block->storing;
  }
  const u32 group = me.stored + 1;
  const Agent reads{agent_of_reads(me.storing - 1), group, me.clock, &me, name};
  const Agent writes{agent_of_writes(me.storing - 1), group, me.clock, &me, name};
  access_by(reads, offset_of(source, 16, name, FRAME), bytes, false, HERE, FRAME);
  write_by(writes, to, bytes, adds, HERE, FRAME);
  const BulkStore store{static_cast<char*>(destination), source, bytes, group, adds, one_in(load_odds), HERE};
  if (!store.late) complete(store);
  me.bulk.push_back(store);
  maybe_yield(warp_odds);
}

void bulk_commit_group() { ++current->stored; }

void bulk_wait_group(u32 pending, bool only_read) {
  Thread& me = *current;
  if (me.stored <= pending) return;
  const u32 done = me.stored - pending;
  std::size_t first = 0;
  for (; first < me.bulk.size() && me.bulk[first].group <= done; ++first) {
    if (me.bulk[first].late) complete(me.bulk[first]);
  }
  me.bulk.erase(me.bulk.begin(), me.bulk.begin() + first);
  if (!me.storing) return;
  learn(me.clock.known, agent_of_reads(me.storing - 1), done);
  if (!only_read) learn(me.clock.known, agent_of_writes(me.storing - 1), done);
}

void fence_proxy_async() {
  Thread& me = *current;
  me.clock.fenced = join(me.clock.fenced, me.clock.known);
  me.fenced = me.warp->time++;
}

// --- registers ------------------------------------------------------------------------------------------

void setmaxnreg(u32 wanted, bool grows) {
  Thread& me = *current;
  Warp& warp = *me.warp;
  Block& block = *me.block;
  if (grows ? wanted < warp.registers : wanted > warp.registers) {
    FAIL("setmaxnreg: from %u registers to %u", warp.registers, wanted);
  }
  together(grows ? "setmaxnreg.inc" : "setmaxnreg.dec", 0xffffffffu, true, nullptr, [&](Meeting&) {
    if (grows) return;
    block.free_registers += (warp.registers - wanted) * warp_size;
    warp.registers = wanted;
    wake(block, block.wanting);
  });
  while (warp.registers != wanted) {
    const u32 more = (wanted - warp.registers) * warp_size;
    if (block.free_registers < more) {
      wait_with(block.wanting, "registers");
      continue;
    }
    block.free_registers -= more;
    warp.registers = wanted;
    wake(block, block.wanting);
  }
}

}  // namespace emulated
