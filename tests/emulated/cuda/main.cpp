// emulated: the program. It is told of launches by its standard input, and runs them one after the other. Device memory
// is a file that it shares with who started it, mapped where that says.
#include <csignal>
#include <cstdio>
#include <cstdlib>

#include <ucontext.h>

#include "state.h"

namespace emulated {
namespace {

void on_signal(int signal, siginfo_t* info, void* context) {
  const auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  if (signal == SIGTERM)
    say("it takes too long");
  else if (signal == SIGFPE)
    say("a division by zero");
  else
    say("an access to %p, which is no memory, or not aligned, or beyond a thread's stack", info->si_addr);
  say_current(registers[REG_RIP] + 1, registers[REG_RBP]);
  quit();
}

void handle_signals() {
  static char memory[64 << 10];
  const stack_t stack{memory, 0, sizeof(memory)};
  sigaltstack(&stack, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTERM}) sigaction(signal, &action, nullptr);
}

void take_bytes(void* to, std::size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) FAIL("the launches end too early");
}

template <class T>
T take() {
  T value;
  take_bytes(&value, sizeof(value));
  return value;
}

void run_all(int file) {
  const u64 base = take<u64>(), bytes = take<u64>();
  const u32 seed = take<u32>(), places = take<u32>(), count = take<u32>();
  poison = take<u32>();
  map_memory(base, bytes, file);
  map_threads();
  set_order(seed, places > 1);
  for (u32 i = 0; i < count; ++i) {
    char name[64];
    take_bytes(name, sizeof(name));
    const u32 blocks = take<u32>(), threads = take<u32>(), smem_bytes = take<u32>(), cluster = take<u32>();
    const u32 argument_bytes = take<u32>(), width = take<u32>();
    if (argument_bytes > max_argument) FAIL("an argument of %u bytes", argument_bytes);
    if (threads == 0 || threads > max_threads) FAIL("%u threads", threads);
    if (cluster == 0 || cluster > max_resident || blocks % cluster)
      FAIL("%u blocks in clusters of %u", blocks, cluster);
    if (width == 0 || blocks % width) FAIL("%u blocks, %u of them along x", blocks, width);
    take_bytes(argument, argument_bytes);
    const Entry entry = entry_of(name);
    if (!entry) FAIL("there is no kernel %s", name);
    run({name, entry, blocks, threads, smem_bytes, cluster, width}, places);
  }
}

}  // namespace
}  // namespace emulated

int main(int, char** arguments) {
  emulated::handle_signals();
  emulated::run_all(std::atoi(arguments[1]));
  return 0;
}
