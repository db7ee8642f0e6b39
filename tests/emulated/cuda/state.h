// emulated: what the parts of the machine share: threads and what they wait for, and who chooses who goes on.
//
// Every CUDA thread is a fiber on a stack of its own. Fibers run one at a time, until they wait for others at an
// instruction of the warp or at a barrier; who goes on is chosen at random, from a seed. Lanes that wait for their warp
// hand over to each other directly, and the scheduler chooses among warps and thread blocks.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <list>
#include <string>
#include <vector>

#include "clocks.h"
#include "machine.h"
#include "unit.h"

namespace emulated {

using u8 = unsigned char;
using Address = std::uintptr_t;

constexpr u32 warp_size = 32, max_threads = 1024, named_barriers = 16;
constexpr u32 max_resident = 16;  // thread blocks that run side by side
constexpr u32 max_argument = 4 << 10;
constexpr u32 stack_bytes = 64 << 10;
constexpr u32 static_bytes = 16 << 10, arena_bytes = 256 << 10;  // of a block's shared memory: __shared__, and all
constexpr u32 registers = 64 << 10;                              // of a block

// How many a block may have: mbarriers, warpgroups, and threads that copy from shared memory with the copy engine.
constexpr u32 max_mbarriers = 64, max_warpgroups = max_threads / 128, max_storing = 4;

// --- threads --------------------------------------------------------------------------------------------

struct Warp;
struct Block;
struct Cluster;

// A copy by cp.async.
struct Copy {
  u32 destination, bytes;
  int valid;
  const char* source;
  bool late;  // the bytes have still to be written
};

// A copy from shared memory by the copy engine, and the group that it belongs to, counted from 1.
struct BulkStore {
  char* destination;
  u32 source, bytes, group;
  bool adds, late;
  Address pc;  // of who asked for it
};

struct Thread {
  char* sp = nullptr;
  char* stack = nullptr;  // its lowest byte
  Block* block = nullptr;
  Warp* warp = nullptr;
  u32 number = 0, lane = 0;
  const char* waits = nullptr;  // for what
  std::vector<Copy> copies;     // in flight
  std::vector<u32> groups;      // how many of them each committed group has
  u32 open = 0;                 // how many belong to none yet
  Clock clock;                  // what it knows of all threads but itself
  u32 fenced = 0;               // the warp's time at its last fence.proxy.async
  u32 storing = 0;              // which of its block's threads it is that copy from shared memory, from 1 on
  u32 stored = 0;               // how many groups of such copies it has committed
  std::vector<BulkStore> bulk;  // in flight
  u32 arrived = 0;              // in which phase of the cluster's barrier it came there and has not waited yet; or 0
  bool waits_for_cluster = false;
};

// The registers of a warp that wgmmas in flight add to: those of each lane, and what they will hold.
struct Accumulator {
  float* at[warp_size];
  std::vector<float> x;  // 16 rows
  u64 last;              // how many wgmmas there are up to the last of them
};

// A warp's part of a wgmma that is in flight.
struct WgmmaPart {
  Accumulator* d;
  u32 a[warp_size][4];
  const u32* at[warp_size];  // where A lies
};
struct Product {
  Wgmma what;
  u32 warps = 0;  // how many have given it to the tensor cores
  WgmmaPart parts[4];
  Clock clock;  // what all of them know
  Address pc;
};

// The wgmmas of four warps, in their order. The first `done` of all have been computed.
struct Warpgroup {
  std::deque<Product> products;  // from number `first` on
  u64 first = 0, issued = 0, done = 0;
};

// Lanes that have come to an instruction that all of a mask execute together.
struct Meeting {
  u32 mask = 0, arrived = 0;
  const char* name = nullptr;
  void* slots[warp_size];  // what each has brought
};

struct Warp {
  Block* block;
  Thread* threads;
  u32 index;
  u32 live, ready;              // lanes that have not ended, and those of them that can go on
  u32 time;                     // see clocks.h
  u32 first;                    // the lane whose turn it is, if it is ready
  bool polled;                  // whether a lane has looked at memory for news since the warp got on
  Meeting meetings[warp_size];  // by the lowest lane of their masks, which do not overlap
  u32 registers;                // of each thread

  // How many wgmmas there were, before each commit, and before the last wait; how many that wants; what it teaches;
  // whether registers have been fenced since.
  u64 products, waited, wanted_products;
  std::deque<u64> groups;
  Known ready_products;
  bool fenced;
  u32 waiting_for_products;             // lanes
  std::list<Accumulator> accumulators;  // in flight
};

struct Barrier {
  const char* name = nullptr;
  u32 arrived = 0, threads = 0;  // how many have come, and, of a named one, are awaited
  u32 waiting[max_threads / warp_size] = {};
  Join join = Join::none;
  int votes = 0, result = 0;
  Clock clock;  // of those who have come
  std::vector<Arrival> arrivals;
};

// A barrier in shared memory, of which a phase has so many arrivals, of which some are still to come, and bytes.
struct Mbarrier {
  u32 count, pending, phase;
  long bytes;
  u32 thread, time;  // who has made it, and when
  bool fenced;       // whether the copy engine knows of it
  u32 waiting[max_threads / warp_size];
  Clock clock;  // of who has come in this phase
  std::vector<Arrival> arrivals;
  Clock done;  // of the phases before
};

// Bytes that the copy engine writes to shared memory: the first `valid` are read, and the others are zeros.
struct Piece {
  u32 destination, bytes, valid;
  const char* source;
};
struct BulkLoad {
  std::vector<Piece> pieces;
  std::vector<u32> words;  // which st.async stores, where that has no source
  u32 bytes, mbarrier, phase;
  Address pc;  // of who asked for it
};

// Who has last written to 4 bytes.
struct Access {
  u32 time, pc;
  unsigned short agent;
  u8 bytes;  // which of the four
};

// Who has read there since: lanes of a warp, or an agent that is no thread.
struct Reads {
  u32 time, pc, lanes, next;  // the next of the same 4 bytes; 0: there is none
  unsigned short reader;      // a warp, or max_threads and the agent
  u8 bytes;
};

struct Cell {
  Access write;
  u32 reads;
};

struct Block {
  u32 index, slot, live, ready;  // threads that have not ended; warps that can go on, one bit each
  char* arena;                   // its shared memory
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Cell> cells;      // of the arena
  std::vector<Reads> reads;     // the first is not used
  u32 unused_reads;             // a list of those that belong to no cell
  std::vector<u8> pending;      // copies by cp.async to 4 bytes of the arena that nobody has waited for
  std::vector<u8> mbarrier_at;  // which mbarrier 8 bytes of the arena are, from 1 on
  std::deque<Mbarrier> mbarriers;
  std::vector<BulkLoad> loads;  // in flight
  std::array<Warpgroup, max_warpgroups> warpgroups;
  u32 storing;         // threads that have copied from shared memory
  u32 free_registers;  // of all threads
  u32 wanting;         // warps that wait for registers
  Barrier barriers[named_barriers];
  Cluster* cluster;
};

// Thread blocks that run side by side, and their barrier. Every launch has clusters, if only of one block.
struct Cluster {
  std::vector<Block*> blocks;  // by their ranks
  u32 phase = 1;               // one more than the barrier has opened
  u32 arrived = 0;             // threads that have come to it, and have not ended
};

// Agents of a block that are no threads.
u32 agent_of_mbarrier(u32 index);  // copies that complete there, whose time is the number of phases
u32 agent_of_products(u32 warpgroup);
u32 agent_of_reads(u32 storing);
u32 agent_of_writes(u32 storing);

struct Launch {
  std::string name;
  Entry entry;
  u32 blocks, threads, smem_bytes, cluster;
  u32 width;  // blocks along x; the rest are along y
};

extern const Launch* launch;  // the present one
extern Thread* current;       // null: the scheduler
extern u32 launches;          // up to the present one
extern u32 reserved;          // bytes of __shared__ variables
extern u32 poison;            // what memory holds that nobody has written to
extern bool interleaved;      // whether blocks run side by side

// Runs a launch. `places` blocks run side by side, and the next begins when one of them has ended.
// Those of a cluster run side by side in any case, and begin together, when those of another have all ended.
void run(const Launch& given, u32 places);

// Reserves the addresses of stacks and shared memory.
void map_threads();

// Sets what is chosen at random, and how often.
void set_order(u32 seed, bool side_by_side);

// The argument of the launch, which every thread may read.
extern char argument[max_argument];

// --- who goes on ----------------------------------------------------------------------------------------

u32 random_below(u32 end);
inline bool one_in(u32 odds) { return random_below(odds) == 0; }

extern u32 warp_odds;  // one in so many times others go on, though nobody has to wait

// Lets others go on, and comes back when the scheduler pleases: always, now and then, or to another block.
void yield();
inline void maybe_yield(u32 odds) {
  if (one_in(odds)) yield();
}
void maybe_leave_block();

// Lets others go on until the current thread is made ready.
void pause();

void make_ready(Warp& warp, u32 lanes);
void make_wait(Warp& warp, u32 lanes);

// The current thread has done something that others may have waited for, or has found nothing new in memory.
void bring_news();
void look_for_news(Address frame);

// Lets the lanes of a meeting that is over go on.
void part(Warp& warp, Meeting& meeting);

// --- errors ---------------------------------------------------------------------------------------------

// The program ends; its standard error says what is wrong, of which thread and where. Lines that begin with "at" are
// return addresses, innermost first, of which who started the program knows the lines.
#define HERE reinterpret_cast<std::uintptr_t>(__builtin_return_address(0))
#define FRAME reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0))
#define FAIL(...) ::emulated::fail(FRAME, __VA_ARGS__)
[[noreturn]] __attribute__((format(printf, 2, 3), noinline)) void fail(Address frame, const char* format, ...);

// The same in parts: what is wrong, the current thread and its place, and the end.
__attribute__((format(printf, 1, 2))) void say(const char* format, ...);
void say_current(Address pc, Address frame);
[[noreturn]] void quit();

// --- what lanes do together -----------------------------------------------------------------------------

// The lanes of a mask come together; `finish` is called once, with what each of them has brought. Of instructions that
// are `aligned` no lane may have ended.
template <class Finish>
__attribute__((always_inline)) inline void together(const char* name, u32 mask, bool aligned, void* mine,
                                                    Finish&& finish) {
  Thread& me = *current;
  Warp& warp = *me.warp;
  if (!(mask >> me.lane & 1)) FAIL("%s: lane %u is not in its own mask %08x", name, me.lane, mask);
  const u32 wanted = mask & warp.live;
  if (aligned && wanted != mask) FAIL("%s: lanes %08x have ended", name, mask & ~warp.live);
  Meeting& meeting = warp.meetings[__builtin_ctz(mask)];
  if (!meeting.arrived) {
    meeting.mask = mask;
    meeting.name = name;
  } else if (meeting.mask != mask || meeting.name != name) {
    FAIL("lanes of a warp come together in different instructions: %s of %08x and %s of %08x", meeting.name,
         meeting.mask, name, mask);
  }
  meeting.slots[me.lane] = mine;
  meeting.arrived |= 1u << me.lane;
  if (meeting.arrived == wanted) {
    finish(meeting);
    part(warp, meeting);
    maybe_yield(warp_odds);
  } else {
    me.waits = name;
    make_wait(warp, 1u << me.lane);
    pause();
    me.waits = nullptr;
  }
}

template <class Each>
inline void for_lanes(u32 mask, Each&& each) {
  for (; mask; mask &= mask - 1) each(__builtin_ctz(mask));
}

// --- who knows what -------------------------------------------------------------------------------------

// The current thread tells what it has done and knows, and what it is told.
Arrival arrive(Thread& thread);
Clock release(Thread& thread);

// --- the copy engine and the tensor cores ---------------------------------------------------------------

// The offset of an address of shared memory into the arena of the current thread's block.
u32 offset_of(u32 address, u32 alignment, const char* name, Address frame);
inline char* pointer_of(u32 address) { return reinterpret_cast<char*>(static_cast<Address>(address)); }

// An access of an agent that is no thread, on behalf of somebody who knows so much. What threads have written has to be
// fenced as well.
struct Agent {
  u32 number, time;
  const Clock& clock;
  const Thread* thread;  // who asks for it, if it is one thread
  const char* name;
};
void access_by(const Agent& agent, u32 offset, u32 bytes, bool write, Address pc, Address frame);

// A store of st.async to the shared memory of a block, of which nobody may have touched the bytes before: nothing
// orders what the block does with its memory before what others store there.
void store_by(Block& owner, const Agent& agent, u32 offset, u32 bytes, Address pc, Address frame);

// The same of device memory. Who adds does not overwrite what others have added.
void read_by(const char* name, Address address, u32 bytes, Address pc, Address frame);
void write_by(const Agent& agent, Address address, u32 bytes, bool adds, Address pc, Address frame);

// Completes one of the block's copies to shared memory; false: there is none.
bool complete_load(Block& block);

// A block begins, or a thread of it ends.
void begin_engines(Block& block);
void end_engines(Thread& thread);

// Computes the first wgmmas of a warpgroup, up to `end`.
void multiply(Block& block, Warpgroup& warpgroup, u64 end);

// Lets a warp wait until it is made ready; `waiting` has a bit for each.
void wait_with(u32& waiting, const char* name);
void wake(Block& block, u32& waiting);

// --- memory ---------------------------------------------------------------------------------------------

// Maps device memory from a file that begins with it; behind it is a byte for each of its bytes, which says what may be
// done with that.
void map_memory(Address base, u64 bytes, int file);

// mmap, which ends the program if there is no memory.
void* map(Address at, u64 bytes, int protection, int flags, int file, u64 offset);

// Nobody has told anybody anything when a launch begins.
void forget();

}  // namespace emulated
