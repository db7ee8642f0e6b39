// emulated: shared, local and device memory.
//
// Kernels are compiled with -fsanitize=thread, but without its library: all of their loads and stores call functions
// that are defined here. So every access is looked up. It has to be to what a thread may touch, and come after what
// others have done there: see clocks.h. All of this is seen in any order in which threads run.
#include <cerrno>
#include <cstdio>
#include <cstring>

#include <sys/mman.h>

#include "numbers.h"
#include "state.h"

extern "C" char __executable_start, _end;

namespace emulated {
namespace {

enum : u8 { readable = 1, writable = 2 };  // what may be done with a byte of device memory
constexpr u32 late_odds = 2;               // one in so many asynchronous copies is

// Who has last written to 4 bytes of device memory, or added to them.
struct Written {
  Access access;
  u32 block, launch;
  bool adds;
};

char* memory = nullptr;
const u8* rights = nullptr;
Written* written = nullptr;
u64 memory_bytes = 0;
std::map<Address, Ref<Others>> told;  // by the address at which it was

// --- shared memory --------------------------------------------------------------------------------------

// Where an offset into an arena lies, in words.
u32 byte_of(u32 offset) { return offset < static_bytes ? offset : offset - static_bytes; }
const char* part_of(u32 offset) { return offset < static_bytes ? "__shared__ variables" : "dynamic shared memory"; }
const char* word_of(bool write) { return write ? "written" : "read"; }

[[noreturn]] __attribute__((noinline)) void report_race(const char* who, u32 other, bool wrote, u32 pc_before,
                                                        u32 offset, bool write, const Thread* me, const char* name,
                                                        Address frame, Address pc) {
  say("a race: byte %u of %s is %s%s%s, and was %s by %s without a barrier between", byte_of(offset), part_of(offset),
      word_of(write), name ? " by " : "", name ? name : "", word_of(wrote), who);
  say_current(pc, me ? frame : 0);
  if (other < max_threads)
    std::fprintf(stderr, "of: the other, or one of them, of warp %u\nat %x\n", other / warp_size, pc_before);
  else
    std::fprintf(stderr, "of: the other\nat %x\n", pc_before);
  quit();
}

// Which of the 4 bytes of a cell belong to some bytes from an offset on.
u8 bytes_of_cell(Address cell, Address offset, u32 bytes) {
  const Address begin = cell * 4, end = offset + bytes;
  const u32 first = offset > begin ? offset - begin : 0, last = end - begin < 4 ? end - begin : 4;
  return ((1u << last) - 1) & ~((1u << first) - 1);
}

// An access of a thread, together with the one before if that is its own and as recent.
Access access_of(const Thread& me, u8 bytes, Address pc, const Access& before = {}) {
  Access now{me.warp->time, static_cast<u32>(pc), static_cast<unsigned short>(me.number), bytes};
  if (before.agent == now.agent && before.time == now.time) now.bytes |= before.bytes;
  return now;
}

// Whether an agent of the block has done something, up to a time, before what is done by who knows so much, or by the
// same thread.
bool knows(const Known& known, const Thread* me, u32 agent, u32 time) {
  return (me && me->number == agent) || time_of(known, agent) >= time;
}

Reads& new_reads(Block& block, Cell& cell, u32 reader, u32 time) {
  u32 at = block.unused_reads;
  if (at) {
    block.unused_reads = block.reads[at].next;
  } else {
    at = block.reads.size();
    block.reads.push_back({});
  }
  block.reads[at] = {time, 0, 0, cell.reads, static_cast<unsigned short>(reader), 0};
  cell.reads = at;
  return block.reads[at];
}

void forget_reads(Block& block, u32& at) {
  const u32 unused = at;
  at = block.reads[at].next;
  block.reads[unused].next = block.unused_reads;
  block.unused_reads = unused;
}

// The reads of a cell by an agent that is no thread, of which the last is enough to know.
Reads& reads_of(Block& block, Cell& cell, u32 reader, u32 time) {
  for (u32 at = cell.reads; at; at = block.reads[at].next) {
    if (block.reads[at].reader == reader) return block.reads[at];
  }
  return new_reads(block, cell, reader, time);
}

// Notes that a thread reads. Lanes of its warp that are known to have read before need not be remembered.
void note_read(Cell& cell, const Thread& me, u8 bytes, Address pc) {
  Block& block = *me.block;
  const u32 time = me.warp->time, first = me.warp->index * warp_size;
  Reads* now = nullptr;
  for (u32* at = &cell.reads; *at;) {
    Reads& reads = block.reads[*at];
    if (reads.reader == me.warp->index) {
      if (reads.time == time) {
        now = &reads;
        break;
      }
      for_lanes(reads.lanes, [&](u32 lane) {
        if (knows(me.clock.known, &me, first + lane, reads.time)) reads.lanes &= ~(1u << lane);
      });
      if (!reads.lanes) {
        forget_reads(block, *at);
        continue;
      }
    }
    at = &reads.next;
  }
  if (!now) now = &new_reads(block, cell, me.warp->index, time);
  now->lanes |= 1u << me.lane;
  now->bytes |= bytes;
  now->pc = pc;
}

// What is done with a cell has to come after what was. `name`: what does it for thread `me`, or for several; null:
// that thread itself.
void check_cell(Block& block, Cell& cell, u32 index, u8 mask, bool write, const Clock& clock, const Thread* me,
                const char* name, Address pc, Address frame) {
  const Access& before = cell.write;
  if (before.bytes & mask) {
    const bool by_thread = before.agent < launch->threads;
    if (!knows(clock.known, me, before.agent, before.time)) {
      if (!by_thread && !name) {
        fail(frame, "byte %u of %s is %s, but an asynchronous copy to it was not waited for", byte_of(index * 4),
             part_of(index * 4), word_of(write));
      }
      report_race(by_thread ? "another thread" : "an asynchronous copy", by_thread ? before.agent : max_threads, true,
                  before.pc, index * 4, write, me, name, frame, pc);
    }
    const bool own_fence = me && me->number == before.agent && me->fenced >= before.time;
    if (name && by_thread && !own_fence && time_of(clock.fenced, before.agent) < before.time) {
      say("byte %u of %s is %s by %s, and was written by a thread without a fence.proxy.async between",
          byte_of(index * 4), part_of(index * 4), word_of(write), name);
      say_current(pc, me ? frame : 0);
      std::fprintf(stderr, "of: the other, of warp %u\nat %x\n", before.agent / warp_size, before.pc);
      quit();
    }
  }
  if (!write) return;
  for (u32* at = &cell.reads; *at;) {
    Reads& reads = block.reads[*at];
    if (reads.bytes & mask) {
      const bool by_warp = reads.reader < max_threads;
      const u32 first = by_warp ? reads.reader * warp_size : reads.reader - max_threads;
      for_lanes(by_warp ? reads.lanes : 1, [&](u32 lane) {
        if (knows(clock.known, by_warp ? me : nullptr, first + lane, reads.time)) return;
        report_race(by_warp ? "another thread" : "wgmma or an asynchronous copy", by_warp ? first + lane : max_threads,
                    false, reads.pc, index * 4, write, me, name, frame, pc);
      });
      reads.bytes &= ~mask;
    }
    if (reads.bytes) {
      at = &reads.next;
      continue;
    }
    forget_reads(block, *at);
  }
}

void check_extent(u32 offset, u32 bytes, bool write, Address frame) {
  const u32 end = offset + bytes;
  if (end <= reserved || (offset >= static_bytes && end <= static_bytes + launch->smem_bytes)) return;
  fail(frame, "%u bytes are %s at byte %d of dynamic shared memory, of which there are %u bytes", bytes, word_of(write),
       static_cast<int>(offset - static_bytes), launch->smem_bytes);
}

// What the current thread does with bytes of its block's shared memory, at an offset into its arena. What is `relaxed`
// may be done by others at the same time, and is not remembered.
void access_shared(u32 offset, u32 bytes, bool write, Address pc, Address frame, bool copy = false,
                   bool relaxed = false) {
  const Thread& me = *current;
  Block& block = *me.block;
  check_extent(offset, bytes, write, frame);
  for (u32 i = offset / 4; i * 4 < offset + bytes; ++i) {
    const u8 mask = bytes_of_cell(i, offset, bytes);
    Cell& cell = block.cells[i];
    if (block.pending[i] && !copy) {
      fail(frame, "byte %u of %s is %s, but an asynchronous copy to it was not waited for", byte_of(i * 4),
           part_of(i * 4), word_of(write));
    }
    if (block.mbarrier_at[i / 2]) {
      fail(frame, "byte %u of %s is %s, which is part of an mbarrier", byte_of(i * 4), part_of(i * 4), word_of(write));
    }
    check_cell(block, cell, i, mask, write, me.clock, &me, nullptr, pc, frame);
    if (relaxed) continue;
    if (write)
      cell.write = access_of(me, mask, pc, cell.write);
    else
      note_read(cell, me, mask, pc);
  }
}

// --- device memory --------------------------------------------------------------------------------------

void check_rights(Address address, u32 bytes, u8 right, const char* name, Address frame) {
  const Address offset = address - reinterpret_cast<Address>(memory);
  if (offset >= memory_bytes || offset + bytes > memory_bytes) {
    fail(frame, "%s: %u bytes at address %lx, which are no memory", name, bytes, static_cast<unsigned long>(address));
  }
  for (u32 i = 0; i < bytes; ++i) {
    if (rights[offset + i] & right) continue;
    fail(frame, "%s: of %u bytes at address %lx, that at address %lx may not be %s", name, bytes,
         static_cast<unsigned long>(address), static_cast<unsigned long>(address + i), word_of(right == writable));
  }
}

template <class T>
void check_word(const T* pointer, u8 right, const char* name, Address frame) {
  const Address address = reinterpret_cast<Address>(pointer);
  if (address % sizeof(T)) {
    fail(frame, "%s: address %lx is no multiple of %zu", name, static_cast<unsigned long>(address), sizeof(T));
  }
  check_rights(address, sizeof(T), right, name, frame);
}

// Whether what was written is there for the current thread to be read: whoever wrote it has told it, at a barrier or by
// a release that was acquired. What launches before wrote is.
bool is_known(const Written& by) {
  if (by.launch != launches) return true;
  const Thread& me = *current;
  if (by.block == me.block->index) return knows(me.clock.known, &me, by.access.agent, by.access.time);
  if (!me.clock.others) return false;
  const auto found = me.clock.others->of.find(by.block);
  return found != me.clock.others->of.end() && time_of(found->second, by.access.agent) >= by.access.time;
}

[[noreturn]] __attribute__((noinline)) void report_untold(const Written& by, Address address, Address frame,
                                                          Address pc) {
  say("a race: what is at address %lx is read, and was written by another thread that has not told this one",
      static_cast<unsigned long>(address));
  say_current(pc, frame);
  std::fprintf(stderr, "of: the other, block %u, thread %u\nat %x\n", by.block, by.access.agent, by.access.pc);
  quit();
}

// A load or a store of device memory. Several threads may store to the same place: they may mean the same.
void access_global(Address address, u32 bytes, bool write, const char* name, Address pc, Address frame) {
  check_rights(address, bytes, write ? writable : readable, name, frame);
  const Address offset = address - reinterpret_cast<Address>(memory);
  for (Address i = offset / 4; i * 4 < offset + bytes; ++i) {
    const u8 mask = bytes_of_cell(i, offset, bytes);
    Written& by = written[i];
    if (write) {
      const bool own = by.launch == launches && by.block == current->block->index;
      by = {access_of(*current, mask, pc, own ? by.access : Access{}), current->block->index, launches, false};
    } else if (by.access.bytes & mask && !is_known(by)) {
      report_untold(by, address, frame, pc);
    }
  }
  if (write && interleaved) maybe_yield(256);
}

void release(const void* address) {
  const Clock clock = emulated::release(*current);
  Clock all, there;
  all.others = Ref<Others>(new Others);
  if (clock.others) all.others->of = clock.others->of;
  all.others->of[current->block->index] = clock.known;
  Ref<Others>& before = told[reinterpret_cast<Address>(address)];
  there.others = before;
  join(there, all);
  before = there.others;
}

void acquire(const void* address) {
  const auto found = told.find(reinterpret_cast<Address>(address));
  if (found == told.end()) return;
  Clock learned;
  learned.others = found->second;
  const auto own = learned.others->of.find(current->block->index);
  if (own != learned.others->of.end()) learned.known = own->second;
  join(current->clock, learned);
}

// --- all of it ------------------------------------------------------------------------------------------

// A load or a store of the kernel's own.
__attribute__((always_inline)) inline void access(const void* pointer, u32 bytes, bool write, Address pc,
                                                  Address frame) {
  const Address address = reinterpret_cast<Address>(pointer);
  if (!current || address - reinterpret_cast<Address>(current->stack) < stack_bytes) return;
  const Address shared = address - reinterpret_cast<Address>(current->block->arena);
  if (shared < arena_bytes) return access_shared(static_cast<u32>(shared), bytes, write, pc, frame);
  const Address low = reinterpret_cast<Address>(&__executable_start), high = reinterpret_cast<Address>(&_end);
  if (address - low < high - low) return;  // constants
  access_global(address, bytes, write, write ? "a store" : "a load", pc, frame);
}

}  // namespace

u32 offset_of(u32 address, u32 alignment, const char* name, Address frame) {
  const u32 offset = address - static_cast<u32>(reinterpret_cast<Address>(current->block->arena));
  if (offset >= arena_bytes) fail(frame, "%s: %x is no address of the block's shared memory", name, address);
  if (address % alignment) fail(frame, "%s: address %x is no multiple of %u", name, address, alignment);
  return offset;
}

void* map(Address at, u64 bytes, int protection, int flags, int file, u64 offset) {
  void* const mapped = mmap(reinterpret_cast<void*>(at), bytes, protection, flags, file, offset);
  if (mapped == MAP_FAILED || (at && mapped != reinterpret_cast<void*>(at))) {
    say("no memory at %lx: %s", static_cast<unsigned long>(at), std::strerror(errno));
    quit();
  }
  return mapped;
}

void map_memory(Address base, u64 bytes, int file) {
  const int both = PROT_READ | PROT_WRITE, own = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  memory_bytes = bytes;
  memory = static_cast<char*>(map(base, bytes, both, MAP_SHARED | MAP_FIXED_NOREPLACE, file, 0));
  rights = static_cast<const u8*>(map(0, bytes, PROT_READ, MAP_SHARED, file, bytes));
  written = static_cast<Written*>(map(0, bytes / 4 * sizeof(Written), both, own, -1, 0));
}

void forget() { told.clear(); }

// --- what agents do that are no threads -----------------------------------------------------------------

void access_by(const Agent& agent, u32 offset, u32 bytes, bool write, Address pc, Address frame) {
  Block& block = *current->block;
  check_extent(offset, bytes, write, frame);
  for (u32 i = offset / 4; i * 4 < offset + bytes; ++i) {
    const u8 mask = bytes_of_cell(i, offset, bytes);
    Cell& cell = block.cells[i];
    if (block.pending[i] || block.mbarrier_at[i / 2]) {
      fail(frame, "byte %u of %s is %s by %s, which %s", byte_of(i * 4), part_of(i * 4), word_of(write), agent.name,
           block.pending[i] ? "cp.async writes" : "is part of an mbarrier");
    }
    check_cell(block, cell, i, mask, write, agent.clock, agent.thread, agent.name, pc, frame);
    if (write) {
      cell.write = {agent.time, static_cast<u32>(pc), static_cast<unsigned short>(agent.number), mask};
      continue;
    }
    Reads& reads = reads_of(block, cell, max_threads + agent.number, agent.time);
    reads.time = agent.time;
    reads.pc = pc;
    reads.bytes |= mask;
  }
}

void store_by(Block& owner, const Agent& agent, u32 offset, u32 bytes, Address pc, Address frame) {
  check_extent(offset, bytes, true, frame);
  for (u32 i = offset / 4; i * 4 < offset + bytes; ++i) {
    Cell& cell = owner.cells[i];
    if (owner.pending[i] || owner.mbarrier_at[i / 2] || cell.write.bytes || cell.reads) {
      fail(frame, "a race: byte %u of %s of block %u is written by %s, and was touched before", byte_of(i * 4),
           part_of(i * 4), owner.index, agent.name);
    }
    cell.write = {agent.time, static_cast<u32>(pc), static_cast<unsigned short>(agent.number), 15};
  }
}

void read_by(const char* name, Address address, u32 bytes, Address pc, Address frame) {
  access_global(address, bytes, false, name, pc, frame);
}

void write_by(const Agent& agent, Address address, u32 bytes, bool adds, Address pc, Address frame) {
  check_rights(address, bytes, writable, agent.name, frame);
  const Address offset = address - reinterpret_cast<Address>(memory);
  for (Address i = offset / 4; i * 4 < offset + bytes; ++i) {
    Written& by = written[i];
    if (by.access.bytes && !(adds && by.adds) && !is_known(by)) report_untold(by, address, frame, pc);
    by = {{agent.time, static_cast<u32>(pc), static_cast<unsigned short>(agent.number), 15},
          current->block->index,
          launches,
          adds};
  }
}

// --- shared memory --------------------------------------------------------------------------------------

u32 reserve(u32 bytes, u32 alignment) {
  const u32 place = (reserved + alignment - 1) / alignment * alignment;
  reserved = place + bytes;
  if (reserved > static_bytes) FAIL("__shared__ variables take more than %u bytes", static_bytes);
  return place;
}

void* shared_object(u32 place) { return current->block->arena + place; }
char* dynamic_shared() { return current->block->arena + static_bytes; }

u32 shared_address(const void* pointer) {
  const Address offset = reinterpret_cast<Address>(pointer) - reinterpret_cast<Address>(current->block->arena);
  if (offset >= arena_bytes) FAIL("shared_address: %p is not in the block's shared memory", pointer);
  return static_cast<u32>(reinterpret_cast<Address>(pointer));
}

void ld_shared(void* to, u32 address, u32 bytes) {
  access_shared(offset_of(address, bytes, "ld.shared", FRAME), bytes, false, HERE, FRAME);
  std::memcpy(to, pointer_of(address), bytes);
}

void st_shared(u32 address, const void* from, u32 bytes) {
  access_shared(offset_of(address, bytes, "st.shared", FRAME), bytes, true, HERE, FRAME);
  std::memcpy(pointer_of(address), from, bytes);
}

u32 ld_relaxed_shared(u32 address) {
  access_shared(offset_of(address, 4, "ld.relaxed.shared", FRAME), 4, false, HERE, FRAME, false, true);
  u32 value;
  std::memcpy(&value, pointer_of(address), 4);
  return value;
}

void st_relaxed_shared(u32 address, u32 value) {
  access_shared(offset_of(address, 4, "st.relaxed.shared", FRAME), 4, true, HERE, FRAME, false, true);
  std::memcpy(pointer_of(address), &value, 4);
}

namespace {

// What a lane brings to ldmatrix and stmatrix: its registers, and the address of its row.
struct Rows {
  u32 (*r)[4];
  u32 address;
};

Rows& rows_of(const Meeting& meeting, u32 lane) { return *static_cast<Rows*>(meeting.slots[lane]); }

}  // namespace

// Lane l names row l % 8 of matrix l / 8, and gets elements 2 (l % 4) and the next of row l / 4 of each matrix, or of
// its column.
void ldmatrix_x4(u32 (&r)[4], u32 address, bool transposed) {
  access_shared(offset_of(address, 16, "ldmatrix", FRAME), 16, false, HERE, FRAME);
  Rows mine{&r, address};
  together(transposed ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, true, &mine, [transposed](Meeting& meeting) {
    for (u32 matrix = 0; matrix < 4; ++matrix) {
      u16 x[8][8];
      for (u32 row = 0; row < 8; ++row) std::memcpy(x[row], pointer_of(rows_of(meeting, 8 * matrix + row).address), 16);
      for (u32 lane = 0; lane < warp_size; ++lane) {
        const u32 row = lane / 4, col = 2 * (lane % 4);
        const u32 low = transposed ? x[col][row] : x[row][col], high = transposed ? x[col + 1][row] : x[row][col + 1];
        (*rows_of(meeting, lane).r)[matrix] = low | high << 16;
      }
    }
  });
}

void stmatrix_x4(u32 address, const u32 (&r)[4]) {
  access_shared(offset_of(address, 16, "stmatrix", FRAME), 16, true, HERE, FRAME);
  u32 copy[4] = {r[0], r[1], r[2], r[3]};
  Rows mine{&copy, address};
  together("stmatrix", 0xffffffffu, true, &mine, [](Meeting& meeting) {
    for (u32 matrix = 0; matrix < 4; ++matrix) {
      for (u32 row = 0; row < 8; ++row) {
        u32 words[4];
        for (u32 q = 0; q < 4; ++q) words[q] = (*rows_of(meeting, 4 * row + q).r)[matrix];
        std::memcpy(pointer_of(rows_of(meeting, 8 * matrix + row).address), words, 16);
      }
    }
  });
}

namespace {

void write(const Copy& copy) {
  char* const to = pointer_of(copy.destination);
  if (copy.valid) std::memcpy(to, copy.source, copy.valid);
  std::memset(to + copy.valid, 0, copy.bytes - copy.valid);
}

}  // namespace

// The hardware writes at any time until it is waited for: here at once, or as late as that can be. Nobody may touch the
// bytes in between.
void cp_async(u32 destination, const void* source, u32 bytes, int valid) {
  const u32 offset = offset_of(destination, bytes, "cp.async", FRAME);
  const Address from = reinterpret_cast<Address>(source);
  if (valid < 0 || valid > static_cast<int>(bytes)) FAIL("cp.async: %d of %u bytes are to be read", valid, bytes);
  if (valid && from % bytes) {
    FAIL("cp.async: source %lx is no multiple of %u", static_cast<unsigned long>(from), bytes);
  }
  if (valid) access_global(from, valid, false, "cp.async", HERE, FRAME);
  access_shared(offset, bytes, true, HERE, FRAME);
  for (u32 i = offset / 4; i < (offset + bytes) / 4; ++i) ++current->block->pending[i];
  const Copy copy{destination, bytes, valid, static_cast<const char*>(source), one_in(late_odds)};
  if (!copy.late) write(copy);
  current->copies.push_back(copy);
  ++current->open;
}

void cp_async_commit_group() {
  current->groups.push_back(current->open);
  current->open = 0;
}

void cp_async_wait_group(u32 pending) {
  Thread& me = *current;
  u32 groups = 0, copies = 0;
  while (me.groups.size() - groups > pending) copies += me.groups[groups++];
  for (u32 i = 0; i < copies; ++i) {
    const Copy& copy = me.copies[i];
    const u32 offset = copy.destination - static_cast<u32>(reinterpret_cast<Address>(me.block->arena));
    if (copy.late) write(copy);
    for (u32 j = offset / 4; j < (offset + copy.bytes) / 4; ++j) --me.block->pending[j];
    access_shared(offset, copy.bytes, true, HERE, FRAME, true);
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + copies);
  me.groups.erase(me.groups.begin(), me.groups.begin() + groups);
}

// --- local memory: a thread's stack ---------------------------------------------------------------------

u32 local_address(const void* pointer) {
  const Address offset = reinterpret_cast<Address>(pointer) - reinterpret_cast<Address>(current->stack);
  if (offset >= stack_bytes) FAIL("local_address: %p is not the thread's own memory", pointer);
  return static_cast<u32>(reinterpret_cast<Address>(pointer));
}

void* local_pointer(u32 address) { return pointer_of(address); }

// --- device memory --------------------------------------------------------------------------------------

i32 ld_acquire(const i32* address) {
  check_word(address, readable, "ld.acquire", FRAME);
  look_for_news(FRAME);
  acquire(address);
  return *address;
}

void st_release(i32* address, i32 value) {
  check_word(address, writable, "st.release", FRAME);
  bring_news();
  release(address);
  *address = value;
  maybe_leave_block();
}

i32 atomic_add(i32* address, i32 value, bool acquires) {
  check_word(address, writable, "atom.add", FRAME);
  if (interleaved) maybe_yield(warp_odds);
  bring_news();
  release(address);
  if (acquires) acquire(address);
  const i32 found = *address;
  *address = static_cast<i32>(static_cast<u32>(found) + static_cast<u32>(value));
  maybe_leave_block();
  return found;
}

i32 atomic_inc(i32* address, i32 last) {
  check_word(address, writable, "atom.inc", FRAME);
  if (interleaved) maybe_yield(warp_odds);
  bring_news();
  release(address);
  acquire(address);
  const u32 found = static_cast<u32>(*address);
  *address = found >= static_cast<u32>(last) ? 0 : static_cast<i32>(found + 1);
  maybe_leave_block();
  return static_cast<i32>(found);
}

i32 atomic_add_relaxed(i32* address, i32 value) {
  check_word(address, writable, "atomicAdd", FRAME);
  if (interleaved) maybe_yield(warp_odds);
  bring_news();
  const i32 found = *address;
  *address = static_cast<i32>(static_cast<u32>(found) + static_cast<u32>(value));
  maybe_leave_block();
  return found;
}

i32 atomic_cas(i32* address, i32 expected, i32 value) {
  check_word(address, writable, "atom.cas", FRAME);
  if (interleaved) maybe_yield(warp_odds);
  acquire(address);
  const i32 found = *address;
  if (found == expected) {
    bring_news();
    *address = value;
  }
  maybe_leave_block();
  return found;
}

void reduce_add(float* address, float value) {
  check_word(address, writable, "red.add", FRAME);
  *address = canonical(*address + value);
  if (interleaved) maybe_yield(4 * warp_odds);
}

void reduce_add(u64* address, u64 value) {
  check_word(address, writable, "red.add", FRAME);
  *address += value;
  if (interleaved) maybe_yield(4 * warp_odds);
}

}  // namespace emulated

// --- what the compiler calls for every load and store -----------------------------------------------------

extern "C" {

#define ACCESSES(name, bytes)                                                                    \
  void __tsan_##name##read##bytes(void* at) { emulated::access(at, bytes, false, HERE, FRAME); } \
  void __tsan_##name##write##bytes(void* at) { emulated::access(at, bytes, true, HERE, FRAME); }
ACCESSES(, 1)
ACCESSES(, 2)
ACCESSES(, 4)
ACCESSES(, 8)
ACCESSES(, 16)
ACCESSES(unaligned_, 2)
ACCESSES(unaligned_, 4)
ACCESSES(unaligned_, 8)
ACCESSES(unaligned_, 16)

void __tsan_read_range(void* at, unsigned long bytes) { emulated::access(at, bytes, false, HERE, FRAME); }
void __tsan_write_range(void* at, unsigned long bytes) { emulated::access(at, bytes, true, HERE, FRAME); }

// clang calls these in place of the functions of the standard library.
void* __tsan_memset(void* to, int value, unsigned long bytes) {
  emulated::access(to, bytes, true, HERE, FRAME);
  return std::memset(to, value, bytes);
}

void* __tsan_memmove(void* to, const void* from, unsigned long bytes) {
  emulated::access(from, bytes, false, HERE, FRAME);
  emulated::access(to, bytes, true, HERE, FRAME);
  return std::memmove(to, from, bytes);
}

void* __tsan_memcpy(void* to, const void* from, unsigned long bytes) { return __tsan_memmove(to, from, bytes); }

void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
