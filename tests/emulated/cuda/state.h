// emulated: what the parts of the machine share: threads and what they wait for, and who chooses who goes on.
//
// Every CUDA thread is a fiber on a stack of its own. Fibers run one at a time, until they wait for others at an
// instruction of the warp or at a barrier; who goes on is chosen at random, from a seed. Lanes that wait for their warp
// hand over to each other directly, and the scheduler chooses among warps and thread blocks.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

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

// --- threads --------------------------------------------------------------------------------------------

struct Warp;
struct Block;

// What somebody knows to have happened in other blocks: in each, all before an epoch, and what some threads did in it.
struct Bound {
  u32 epoch = 0;
  std::set<u32> threads;
};
using Known = std::map<u32, Bound>;

// An asynchronous copy.
struct Copy {
  u32 destination, bytes;
  int valid;
  const char* source;
  bool late;  // the bytes have still to be written
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
  Known learned;                // since the block's last barrier
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
  u32 epoch;                    // grows with every __syncwarp and every barrier of the block
  u32 first;                    // the lane whose turn it is, if it is ready
  bool polled;                  // whether a lane has looked at memory for news since the warp got on
  Meeting meetings[warp_size];  // by the lowest lane of their masks, which do not overlap
};

struct Barrier {
  const char* name = nullptr;
  u32 arrived = 0, threads = 0;  // how many have come, and, of a named one, are awaited
  u32 waiting[max_threads / warp_size] = {};
  Join join = Join::none;
  int votes = 0, result = 0;
};

// Who has last written to 4 bytes, or read there since.
struct Access {
  u32 epoch, warp_epoch, pc;
  unsigned short thread;
  u8 bytes;  // which of the four
  u8 many;   // 0: one thread; 1: several of one warp; 2: of several warps
};

// Whether an access of a thread's block is ordered before what the thread does next: by a barrier of the block, by a
// __syncwarp, or because it is its own. No other instruction of a warp orders what its lanes do with memory.
bool ordered(const Access& before, const Thread& thread);

struct Cell {
  Access write, read;
};

struct Block {
  u32 index, slot, live, ready;  // threads that have not ended; warps that can go on, one bit each
  u32 epoch;                     // grows with every barrier; no two blocks have the same one
  char* arena;                   // its shared memory
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Cell> cells;  // of the arena
  std::vector<u8> pending;  // asynchronous copies to 4 bytes of the arena that nobody has waited for
  Barrier barriers[named_barriers];
  Known known;  // to all of its threads
};

struct Launch {
  std::string name;
  Entry entry;
  u32 blocks, threads, smem_bytes;
};

extern const Launch* launch;  // the present one
extern Thread* current;       // null: the scheduler
extern u32 epochs, begun;     // the last one, and the last before the launch
extern u32 reserved;          // bytes of __shared__ variables
extern u32 poison;            // what memory holds that nobody has written to
extern bool interleaved;      // whether blocks run side by side

// Runs a launch. `places` blocks run side by side, and the next begins when one of them has ended.
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

// Takes in what somebody else knows, or what is known of a block.
void add(Known& to, const Known& more);
void add(Known& to, u32 block, const Bound& more);

// --- memory ---------------------------------------------------------------------------------------------

// Maps device memory from a file that begins with it; behind it is a byte for each of its bytes, which says what may be
// done with that.
void map_memory(Address base, u64 bytes, int file);

// mmap, which ends the program if there is no memory.
void* map(Address at, u64 bytes, int protection, int flags, int file, u64 offset);

// Nobody has told anybody anything when a launch begins.
void forget();

}  // namespace emulated
