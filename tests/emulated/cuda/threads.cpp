// emulated: threads: how they take turns, and what they do together.
#include <cstdarg>
#include <cstdio>
#include <utility>

#include <sys/mman.h>
#include <unistd.h>

#include "state.h"

// Goes on at `to`, once what the calling convention says a function keeps is on the stack, whose pointer goes to *from.
extern "C" void emulated_switch(char** from, char* to);

asm(R"(
.text
.globl emulated_switch
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulated_switch, .-emulated_switch
)");

namespace emulated {

const Launch* launch = nullptr;
Thread* current = nullptr;
u32 launches = 0, reserved = 0, poison = 0;
u32 warp_odds = 8;
bool interleaved = false;
alignas(64) char argument[max_argument];

namespace {

constexpr Address stacks_base = 0x80000000, arenas_base = 0x70000000;  // below 4 GB: addresses have 32 bits
constexpr u32 page = 4 << 10;
constexpr u32 saved_words = 8;       // of a fiber that waits, from its stack pointer on
enum { saved_frame = 5, saved_pc };  // which of them
constexpr u32 patience = 1 << 16;    // looks at memory in a row, while nobody else gets on, that are in vain

char* scheduler_sp = nullptr;
std::vector<Block*> resident;
u64 random_state = 1;
u32 block_odds = 8;
bool leaves_block = false;
u64 news = 0, known_news = 0;
u32 looks = 0;

u32 random_number() {  // xorshift64*, Vigna, 2016
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<u32>(random_state * 0x2545f4914f6cdd1dull >> 32);
}

// One of the bits of a mask that is not 0.
u32 random_bit(u32 mask) {
  for (u32 skipped = random_below(__builtin_popcount(mask)); skipped > 0; --skipped) mask &= mask - 1;
  return __builtin_ctz(mask);
}

Thread* lane_that_goes_on(Warp& warp) {
  const u32 first = warp.first, turned = warp.ready >> first | (first ? warp.ready << (warp_size - first) : 0);
  return warp.threads + (__builtin_ctz(turned) + first) % warp_size;
}

char* stack_of(u32 slot, u32 thread) {
  return reinterpret_cast<char*>(stacks_base) + (static_cast<u64>(slot) * max_threads + thread) * stack_bytes;
}

void say_frames(Address pc, Address frame, const Thread& thread) {
  const Address low = reinterpret_cast<Address>(thread.stack), high = low + stack_bytes;
  std::fprintf(stderr, "at");
  if (pc) std::fprintf(stderr, " %lx", static_cast<unsigned long>(pc));
  for (int i = 0; i < 32 && frame >= low && frame + 16 <= high && frame % 8 == 0; ++i) {
    const Address* const at = reinterpret_cast<const Address*>(frame);
    if (at[1] == 0) break;
    std::fprintf(stderr, " %lx", static_cast<unsigned long>(at[1]));
    if (at[0] <= frame) break;
    frame = at[0];
  }
  std::fprintf(stderr, "\n");
}

// Where a thread is that waits.
void say_waiting(const Thread& thread) {
  const Address* const saved = reinterpret_cast<const Address*>(thread.sp);
  say_frames(saved[saved_pc], saved[saved_frame], thread);
}

// Nobody can go on: says who waits for what, and where. Threads of a block that wait for the same are one line.
[[noreturn]] void report_stuck(const char* why, Address frame) {
  std::fprintf(stderr, "emulated: %s is stuck: %s\n", launch->name.c_str(), why);
  for (Block* block : resident) {
    std::map<std::string, std::vector<Thread*>> groups;
    for (Warp& warp : block->warps) {
      for_lanes(warp.live, [&](u32 lane) {
        Thread& thread = warp.threads[lane];
        groups[thread.waits ? thread.waits : "its turn"].push_back(&thread);
      });
    }
    for (const auto& [name, threads] : groups) {
      std::fprintf(stderr, "of: block %u, %zu threads from %u on: waiting for %s\n", block->index, threads.size(),
                   threads[0]->number, name.c_str());
      if (threads[0] == current)
        say_frames(0, frame, *current);
      else
        say_waiting(*threads[0]);
    }
  }
  quit();
}

[[noreturn]] void end_thread();

void run_thread() {
  launch->entry(argument);
  end_thread();
}

void begin_thread(Thread& thread, Block& block, u32 number) {
  thread.block = &block;
  thread.warp = &block.warps[number / warp_size];
  thread.number = number;
  thread.lane = number % warp_size;
  thread.stack = stack_of(block.slot, number);
  thread.waits = nullptr;
  thread.copies.clear();
  thread.groups.clear();
  thread.open = 0;
  thread.clock = {};
  thread.fenced = thread.storing = thread.stored = 0;
  thread.bulk.clear();
  thread.arrived = 0;
  thread.waits_for_cluster = false;
  // What emulated_switch takes off the stack: six registers and where to go on. A function begins 8 bytes below a
  // multiple of 16, and frames end with a 0.
  Address* const sp = reinterpret_cast<Address*>(thread.stack + stack_bytes) - saved_words;
  for (u32 i = 0; i < saved_words; ++i) sp[i] = 0;
  sp[saved_pc] = reinterpret_cast<Address>(&run_thread);
  thread.sp = reinterpret_cast<char*>(sp);
}

void begin_block(Block& block, u32 index) {
  const u32 threads = launch->threads, warps = (threads + warp_size - 1) / warp_size;
  const u32 used = static_bytes + (launch->smem_bytes + 3) / 4 * 4;
  if (used > arena_bytes) FAIL("%u bytes of shared memory are asked for", launch->smem_bytes);
  block.index = index;
  block.live = threads;
  block.ready = 0;
  for (Barrier& barrier : block.barriers) barrier = {};
  u32* const words = reinterpret_cast<u32*>(block.arena);
  for (u32 i = 0; i < used / 4; ++i) words[i] = poison;
  block.cells.assign(used / 4, {});
  block.pending.assign(used / 4, 0);
  block.reads.assign(1, {});
  block.unused_reads = 0;
  for (u32 i = block.threads.size(); i < threads; ++i) {
    // The lowest page is left out, so that a stack that is too small is seen.
    if (mprotect(stack_of(block.slot, i) + page, stack_bytes - page, PROT_READ | PROT_WRITE)) FAIL("no more stacks");
  }
  block.threads.resize(warps * warp_size);
  block.warps.resize(warps);
  for (u32 i = 0; i < warps; ++i) {
    Warp& warp = block.warps[i];
    const u32 lanes = threads - i * warp_size;
    warp.block = &block;
    warp.threads = &block.threads[i * warp_size];
    warp.index = i;
    warp.live = lanes < warp_size ? (1u << lanes) - 1 : 0xffffffffu;
    warp.ready = 0;
    warp.time = 1;
    warp.first = random_below(warp_size);
    warp.polled = false;
    for (Meeting& meeting : warp.meetings) meeting.arrived = 0;
    make_ready(warp, warp.live);
  }
  for (u32 i = 0; i < threads; ++i) begin_thread(block.threads[i], block, i);
  begin_engines(block);
}

// Completes some copy to shared memory, of any block; false: none is on its way.
bool complete_load() {
  const u32 first = random_below(resident.size());
  for (u32 i = 0; i < resident.size(); ++i) {
    if (complete_load(*resident[(first + i) % resident.size()])) return true;
  }
  return false;
}

// Threads of a cluster that have not ended.
u32 live(const Cluster& cluster) {
  u32 threads = 0;
  for (const Block* block : cluster.blocks) threads += block->live;
  return threads;
}

// The blocks of a cluster begin, of which that is the first.
void begin_cluster(Cluster& cluster, u32 first) {
  cluster.phase = 1;
  cluster.arrived = 0;
  for (Block* block : cluster.blocks) {
    begin_block(*block, first++);
    resident.push_back(block);
  }
}

// The place, among the resident blocks, of one that can go on.
u32 choose_block() {
  std::vector<u32> able;
  while (true) {
    for (u32 i = 0; i < resident.size(); ++i) {
      if (resident[i]->ready) able.push_back(i);
    }
    if (!able.empty()) return able[random_below(able.size())];
    if (!complete_load()) report_stuck("nobody can go on", 0);
  }
}

// A warp of a block. Those that look at memory for news are passed over a few times.
Warp& choose_warp(Block& block) {
  Warp* warp = &block.warps[random_bit(block.ready)];
  for (int i = 0; i < 3 && warp->polled; ++i) warp = &block.warps[random_bit(block.ready)];
  return *warp;
}

}  // namespace

void map_threads() {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
  map(stacks_base, static_cast<u64>(max_resident) * max_threads * stack_bytes, PROT_NONE, flags, -1, 0);
  map(arenas_base, static_cast<u64>(max_resident) * arena_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
}

void set_order(u32 seed, bool side_by_side) {
  static constexpr u32 odds[] = {2, 16, 256};
  interleaved = side_by_side;
  random_state = (seed + 1) * 0x9e3779b97f4a7c15ull;
  for (int i = 0; i < 8; ++i) random_number();
  if (!interleaved) return;
  warp_odds = odds[random_below(3)];
  block_odds = odds[random_below(3)];
}

void run(const Launch& given, u32 places) {
  static Block blocks[max_resident];
  static Cluster clusters[max_resident];
  launch = &given;
  ++launches;
  forget();
  begin_clocks(agent_of_writes(max_storing) + 1);
  resident.clear();
  u32 next = 0, place = 0;
  for (u32 first = 0; (first == 0 || first + given.cluster <= places) && next < given.blocks; first += given.cluster) {
    Cluster& cluster = clusters[first];
    cluster.blocks.clear();
    for (u32 slot = first; slot < first + given.cluster; ++slot) {
      Block& block = blocks[slot];
      block.slot = slot;
      block.arena = reinterpret_cast<char*>(arenas_base + static_cast<Address>(slot) * arena_bytes);
      block.cluster = &cluster;
      cluster.blocks.push_back(&block);
    }
    begin_cluster(cluster, next);
    next += given.cluster;
  }
  bring_news();
  while (!resident.empty()) {
    if (place >= resident.size() || !resident[place]->ready || leaves_block || (interleaved && one_in(block_odds))) {
      leaves_block = false;
      place = choose_block();
    }
    Block& block = *resident[place];
    if (one_in(16)) complete_load();
    Warp& warp = choose_warp(block);
    if (warp.polled) leaves_block = one_in(2);  // the news may have to come from another block
    current = lane_that_goes_on(warp);
    emulated_switch(&scheduler_sp, current->sp);
    current = nullptr;
    if (block.live > 0) continue;
    resident.erase(resident.begin() + place);
    if (next == given.blocks || live(*block.cluster)) continue;
    begin_cluster(*block.cluster, next);
    next += given.cluster;
  }
  launch = nullptr;
}

// --- who goes on ----------------------------------------------------------------------------------------

u32 random_below(u32 end) { return static_cast<u32>(static_cast<u64>(random_number()) * end >> 32); }

void make_ready(Warp& warp, u32 lanes) {
  warp.ready |= lanes & warp.live;
  if (warp.ready) warp.block->ready |= 1u << warp.index;
}

void make_wait(Warp& warp, u32 lanes) {
  warp.ready &= ~lanes;
  if (!warp.ready) warp.block->ready &= ~(1u << warp.index);
}

void yield() { emulated_switch(&current->sp, scheduler_sp); }

void maybe_leave_block() {
  if (!interleaved || one_in(2)) return;
  leaves_block = true;
  yield();
}

void pause() {
  Thread* const me = current;
  if (!me->warp->ready) return yield();
  current = lane_that_goes_on(*me->warp);
  emulated_switch(&me->sp, current->sp);
}

void wait_with(u32& waiting, const char* name) {
  Thread& me = *current;
  waiting |= 1u << me.warp->index;
  me.waits = name;
  make_wait(*me.warp, 1u << me.lane);
  pause();
  me.waits = nullptr;
}

void wake(Block& block, u32& waiting) {
  for_lanes(waiting, [&](u32 warp) { make_ready(block.warps[warp], block.warps[warp].live); });
  waiting = 0;
  bring_news();
}

void bring_news() { ++news; }

void look_for_news(Address frame) {
  Thread& me = *current;
  me.warp->polled = true;
  me.warp->first = (me.lane + 1) % warp_size;  // who may have something to do that this lane waits for
  me.waits = "what ld.acquire finds to change";
  if (news != known_news) {
    known_news = news;
    looks = 0;
  } else if (++looks > patience) {
    report_stuck("threads look at memory for news that nobody is left to bring", frame);
  }
  yield();
  me.waits = nullptr;
}

void part(Warp& warp, Meeting& meeting) {
  meeting.arrived = 0;
  make_ready(warp, meeting.mask);
  warp.first = random_below(warp_size);
  if (!warp.polled) bring_news();  // who looks at memory in between does not get on
  warp.polled = false;
}

// --- errors ---------------------------------------------------------------------------------------------

void quit() {
  std::fflush(stderr);
  _exit(1);
}

void say(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "emulated: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  va_end(arguments);
}

void say_current(Address pc, Address frame) {
  if (!current || !launch) return;
  std::fprintf(stderr, "of: block %u of %u, thread %u of %u, of %s\n", current->block->index, launch->blocks,
               current->number, launch->threads, launch->name.c_str());
  say_frames(pc, frame, *current);
}

void fail(Address frame, const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "emulated: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  va_end(arguments);
  say_current(0, frame);
  quit();
}

// --- who a thread is ------------------------------------------------------------------------------------

Index thread_index() { return {current->number, 0, 0}; }
Index block_index() { return {current->block->index % launch->width, current->block->index / launch->width, 0}; }
Index block_extent() { return {launch->threads, 1, 1}; }
Index grid_extent() { return {launch->width, launch->blocks / launch->width, 1}; }
u32 lane() { return current->lane; }
u32 cluster_rank() { return current->block->index % launch->cluster; }
u32 cluster_extent() { return launch->cluster; }

// --- what threads do together ---------------------------------------------------------------------------

Arrival arrive(Thread& thread) { return {thread.number, thread.warp->time++, thread.fenced}; }

Clock release(Thread& thread) {
  Clock clock = thread.clock;
  learn(clock, {arrive(thread)});
  return clock;
}

void sync_warp(u32 mask) {
  Warp& warp = *current->warp;
  together("__syncwarp", mask, false, nullptr, [&](Meeting& meeting) {
    Clock all;
    std::vector<Arrival> arrivals;
    for_lanes(meeting.arrived, [&](u32 lane) {
      const Thread& thread = warp.threads[lane];
      join(all, thread.clock);
      arrivals.push_back({thread.number, warp.time, thread.fenced});
    });
    learn(all, arrivals);
    ++warp.time;
    for_lanes(meeting.arrived, [&](u32 lane) { warp.threads[lane].clock = all; });
  });
}

namespace {

const char* name_of(Vote kind) {
  switch (kind) {
    case Vote::ballot:
      return "__ballot_sync";
    case Vote::any:
      return "__any_sync";
    case Vote::all:
      return "__all_sync";
    case Vote::maximum:
    case Vote::signed_maximum:
      return "__reduce_max_sync";
    case Vote::minimum:
    case Vote::signed_minimum:
      return "__reduce_min_sync";
    case Vote::sum:
      return "__reduce_add_sync";
    case Vote::bit_or:
      return "__reduce_or_sync";
    case Vote::bit_and:
      return "__reduce_and_sync";
    case Vote::bit_xor:
      return "__reduce_xor_sync";
  }
  __builtin_unreachable();
}

// What comes of all lanes' votes before, and of one lane's. Ballots and the like are votes of one bit.
u32 joined(Vote kind, u32 before, u32 x) {
  switch (kind) {
    case Vote::ballot:
    case Vote::any:
    case Vote::bit_or:
      return before | x;
    case Vote::all:
    case Vote::bit_and:
      return before & x;
    case Vote::bit_xor:
      return before ^ x;
    case Vote::sum:
      return before + x;
    case Vote::maximum:
      return x > before ? x : before;
    case Vote::minimum:
      return x < before ? x : before;
    case Vote::signed_maximum:
      return static_cast<i32>(x) > static_cast<i32>(before) ? x : before;
    case Vote::signed_minimum:
      return static_cast<i32>(x) < static_cast<i32>(before) ? x : before;
  }
  __builtin_unreachable();
}

}  // namespace

u32 vote(Vote kind, u32 mask, u32 value) {
  u32 slot = value;
  if (kind == Vote::ballot) slot = static_cast<u32>(value != 0) << current->lane;
  if (kind == Vote::any || kind == Vote::all) slot = value != 0;
  together(name_of(kind), mask, false, &slot, [kind](Meeting& meeting) {
    const auto of = [&](u32 lane) -> u32& { return *static_cast<u32*>(meeting.slots[lane]); };
    const u32 first = __builtin_ctz(meeting.arrived);
    u32 result = of(first);
    for_lanes(meeting.arrived & (meeting.arrived - 1), [&](u32 lane) { result = joined(kind, result, of(lane)); });
    for_lanes(meeting.arrived, [&](u32 lane) { of(lane) = result; });
  });
  return slot;
}

u32 shuffle(u32 mask, u32 value, u32 source) {
  struct Slot {
    u32 value, source, result;
  } slot{value, source % warp_size, poison};
  together("__shfl_sync", mask, false, &slot, [](Meeting& meeting) {
    for_lanes(meeting.arrived, [&](u32 lane) {
      Slot& own = *static_cast<Slot*>(meeting.slots[lane]);
      if (meeting.arrived >> own.source & 1) own.result = static_cast<Slot*>(meeting.slots[own.source])->value;
    });
  });
  return slot.result;
}

namespace {

void open(Block& block, Barrier& barrier) {
  switch (barrier.join) {
    case Join::none:
    case Join::count:
      barrier.result = barrier.votes;
      break;
    case Join::any:
      barrier.result = barrier.votes > 0;
      break;
    case Join::all:
      barrier.result = barrier.votes == static_cast<int>(barrier.arrived);
      break;
  }
  barrier.name = nullptr;
  barrier.arrived = barrier.votes = 0;
  learn(barrier.clock, barrier.arrivals);
  barrier.arrivals.clear();
  for (Warp& warp : block.warps) {
    u32& waiting = barrier.waiting[warp.index];
    if (!waiting) continue;
    for_lanes(waiting, [&](u32 lane) { warp.threads[lane].clock = barrier.clock; });
    warp.polled = false;
    warp.first = random_below(warp_size);
    make_ready(warp, waiting);
    waiting = 0;
  }
  bring_news();
}

// The current thread comes to a barrier of so many threads; 0: of all that have not ended.
int come_to(u32 index, const char* name, u32 threads, bool wait, Join join, int predicate) {
  Thread& me = *current;
  Block& block = *me.block;
  if (index >= named_barriers) FAIL("%s: there is no barrier %u", name, index);
  Barrier& barrier = block.barriers[index];
  if (barrier.name && (barrier.threads != threads || barrier.join != join)) {
    FAIL("threads come to barrier %u by %s and by %s, or not for as many threads", index, barrier.name, name);
  }
  barrier.name = name;
  barrier.threads = threads;
  barrier.join = join;
  barrier.votes += predicate != 0;
  if (!barrier.arrived++) barrier.clock = {};
  emulated::join(barrier.clock, me.clock);
  barrier.arrivals.push_back(arrive(me));
  if (barrier.arrived == (threads ? threads : block.live)) {
    open(block, barrier);
    const int result = barrier.result;
    if (wait) me.clock = barrier.clock;
    maybe_yield(2);
    return result;
  }
  if (!wait) return 0;
  barrier.waiting[me.warp->index] |= 1u << me.lane;
  me.waits = name;
  make_wait(*me.warp, 1u << me.lane);
  pause();
  me.waits = nullptr;
  return barrier.result;
}

// Opens the barrier of a cluster if nobody is missing.
void maybe_open(Cluster& cluster) {
  if (!cluster.arrived || cluster.arrived < live(cluster)) return;
  cluster.arrived = 0;
  ++cluster.phase;
  for (Block* block : cluster.blocks) {
    for (Warp& warp : block->warps) {
      for_lanes(warp.live, [&](u32 lane) {
        if (warp.threads[lane].waits_for_cluster) make_ready(warp, 1u << lane);
      });
      warp.polled = false;
    }
  }
  bring_news();
}

void end_thread() {
  Thread& me = *current;
  Warp& warp = *me.warp;
  Block& block = *me.block;
  end_engines(me);
  make_wait(warp, 1u << me.lane);
  warp.live &= ~(1u << me.lane);
  --block.live;
  if (me.arrived == block.cluster->phase) --block.cluster->arrived;
  bring_news();
  for (Meeting& meeting : warp.meetings) {
    if (!meeting.arrived || !(meeting.mask >> me.lane & 1)) continue;
    say("thread %u of block %u ends, but others of its warp wait for it in %s", me.number, block.index, meeting.name);
    say_waiting(warp.threads[__builtin_ctz(meeting.arrived)]);
    quit();
  }
  Barrier& barrier = block.barriers[0];
  if (barrier.arrived && barrier.arrived == block.live) open(block, barrier);
  maybe_open(*block.cluster);
  pause();
  __builtin_unreachable();
}

}  // namespace

int sync_threads(Join join, int predicate) {
  static const char* const names[] = {"__syncthreads", "__syncthreads_or", "__syncthreads_and", "__syncthreads_count"};
  return come_to(0, names[static_cast<int>(join)], 0, true, join, predicate);
}

void bar_sync(u32 barrier, u32 threads) { come_to(barrier, "bar.sync", threads, true, Join::none, 0); }
void bar_arrive(u32 barrier, u32 threads) { come_to(barrier, "bar.sync", threads, false, Join::none, 0); }

void cluster_arrive() {
  together("barrier.cluster.arrive", 0xffffffffu, true, nullptr, [](Meeting&) {});
  Thread& me = *current;
  Cluster& cluster = *me.block->cluster;
  if (me.arrived) FAIL("barrier.cluster.arrive: the thread has come before and not waited");
  me.arrived = cluster.phase;
  ++cluster.arrived;
  maybe_open(cluster);
  maybe_leave_block();
}

void cluster_wait() {
  together("barrier.cluster.wait", 0xffffffffu, true, nullptr, [](Meeting&) {});
  Thread& me = *current;
  if (!me.arrived) FAIL("barrier.cluster.wait: the thread has not come");
  if (me.arrived == me.block->cluster->phase) {
    me.waits = "barrier.cluster.wait";
    me.waits_for_cluster = true;
    make_wait(*me.warp, 1u << me.lane);
    pause();
    me.waits = nullptr;
    me.waits_for_cluster = false;
  }
  me.arrived = 0;
}

}  // namespace emulated
