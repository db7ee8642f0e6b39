// ptx: moves registers between the warpgroups of a block (PTX ISA: "setmaxnreg"), sm_90a.
#pragma once

namespace ptx {

// Gives registers back, down to `registers` per thread.
template <int registers>
inline void setmaxnreg_dec() {
  static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256, "8 registers at a time, 24 to 256");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// Waits until enough are free to have `registers` per thread.
template <int registers>
inline void setmaxnreg_inc() {
  static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256, "8 registers at a time, 24 to 256");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

}  // namespace ptx
