// emulated: clocks.
#include "clocks.h"

namespace emulated {
namespace {

u32 agents = 0;
std::vector<Times*> unused;

// The last joins: lanes of a warp ask for the same ones, and then share what comes of them.
struct Joined {
  Known a, b, both;
};
Joined last_joins[64];

Known fresh(const Known& from = {}) {
  Times* times;
  if (unused.empty()) {
    times = new Times;
  } else {
    times = unused.back();
    unused.pop_back();
  }
  if (from)
    times->of = from->of;
  else
    times->of.assign(agents, 0);
  return Known(times);
}

Known joined(const Known& a, const Known& b) {
  const u32 *const x = a->of.data(), *const y = b->of.data();
  u32 more = 0, less = 0;
  for (u32 i = 0; i < agents; ++i) {
    more |= x[i] > y[i];
    less |= x[i] < y[i];
  }
  if (!less) return a;
  if (!more) return b;
  Known both = fresh(a);
  u32* const to = both->of.data();
  for (u32 i = 0; i < agents; ++i) to[i] = to[i] > y[i] ? to[i] : y[i];
  return both;
}

Ref<Others> join(const Ref<Others>& a, const Ref<Others>& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  Ref<Others> both = a;
  for (const auto& [block, known] : b->of) {
    const auto found = both->of.find(block);
    const Known before = found == both->of.end() ? Known() : found->second;
    Known more = emulated::join(before, known);
    if (more == before) continue;
    if (both == a) {
      both = Ref<Others>(new Others);
      both->of = a->of;
    }
    both->of[block] = std::move(more);
  }
  return both;
}

}  // namespace

void drop(Times* times) { unused.push_back(times); }
void drop(Others* others) { delete others; }

Known join(const Known& a, const Known& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  const auto hash = reinterpret_cast<unsigned long>(&*a) / 16 * 31 + reinterpret_cast<unsigned long>(&*b) / 16;
  Joined& last = last_joins[hash % 64];
  if (!(last.a == a && last.b == b)) last = {a, b, joined(a, b)};
  return last.both;
}

void join(Clock& to, const Clock& more) {
  to.known = join(to.known, more.known);
  to.fenced = join(to.fenced, more.fenced);
  to.others = join(to.others, more.others);
}

void learn(Clock& to, const std::vector<Arrival>& arrivals) {
  Known known = fresh(to.known), fenced = to.fenced;
  bool shared = true;  // whether `fenced` is still others' too
  for (const Arrival& arrival : arrivals) {
    if (known->of[arrival.agent] < arrival.time) known->of[arrival.agent] = arrival.time;
    if (time_of(fenced, arrival.agent) >= arrival.fenced) continue;
    if (std::exchange(shared, false)) fenced = fresh(fenced);
    fenced->of[arrival.agent] = arrival.fenced;
  }
  to.known = std::move(known);
  to.fenced = std::move(fenced);
}

void learn(Known& to, u32 agent, u32 time) {
  if (time_of(to, agent) >= time) return;
  to = fresh(to);
  to->of[agent] = time;
}

Clock common(const Clock& a, const Clock& b) {
  const auto both = [](const Known& a, const Known& b) -> Known {
    if (a == b || !a) return a;
    if (!b) return b;
    Known least = fresh(a);
    for (u32 i = 0; i < agents; ++i) least->of[i] = a->of[i] < b->of[i] ? a->of[i] : b->of[i];
    return least;
  };
  return {both(a.known, b.known), both(a.fenced, b.fenced), {}};
}

void begin_clocks(u32 count) {
  for (Joined& each : last_joins) each = {};
  agents = count;
}

}  // namespace emulated
