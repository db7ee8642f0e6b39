// emulated: what happened before what: vector clocks, of which a thread's says how much it knows of every other.
//
// A warp's time grows whenever one of its lanes tells others what it has done. What a thread does at a time is known to
// who knows of that thread at that time, or later. So is what the copy engine and the tensor cores do, which have
// times of their own and are agents of their block beside its threads.
#pragma once

#include <map>
#include <utility>
#include <vector>

#include "machine.h"

namespace emulated {

// A pointer to something that counts who points to it, and is then given to `drop`.
template <class T>
class Ref {
 public:
  Ref() = default;
  explicit Ref(T* fresh) : to_(fresh) { ++to_->refs; }
  Ref(const Ref& other) : to_(other.to_) {
    if (to_) ++to_->refs;
  }
  Ref(Ref&& other) noexcept : to_(std::exchange(other.to_, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(to_, other.to_);
    return *this;
  }
  ~Ref() {
    if (to_ && --to_->refs == 0) drop(to_);
  }

  explicit operator bool() const { return to_; }
  T* operator->() const { return to_; }
  T& operator*() const { return *to_; }
  bool operator==(const Ref& other) const { return to_ == other.to_; }

 private:
  T* to_ = nullptr;
};

// How much is known of each agent of a block. It is not changed once others have it.
struct Times {
  u32 refs = 0;
  std::vector<u32> of;
};
void drop(Times* times);
using Known = Ref<Times>;  // null: nothing is known

inline u32 time_of(const Known& known, u32 agent) { return known ? known->of[agent] : 0; }

// The same of other blocks, by their number.
struct Others {
  u32 refs = 0;
  std::map<u32, Known> of;
};
void drop(Others* others);

struct Clock {
  Known known;
  Known fenced;  // what of it is also visible to copies and wgmma: a fence.proxy.async came behind
  Ref<Others> others;
};

// That somebody knows of what an agent did up to a time, and of what it did up to another before a fence.
struct Arrival {
  u32 agent, time, fenced;
};

// What is known to who knows a, and learns b.
Known join(const Known& a, const Known& b);
void join(Clock& to, const Clock& more);

// The same for arrivals.
void learn(Clock& to, const std::vector<Arrival>& arrivals);
void learn(Known& to, u32 agent, u32 time);

// What is known to who knows both.
Clock common(const Clock& a, const Clock& b);

// Begins a launch, of whose blocks each has so many agents.
void begin_clocks(u32 agents);

}  // namespace emulated
