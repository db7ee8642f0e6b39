// emulated: cuda_src/ptx/setmaxnreg.cuh.
#pragma once

namespace ptx {

template <int registers>
inline void setmaxnreg_dec() {
  static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256, "8 registers at a time, 24 to 256");
  emulated::setmaxnreg(registers, false);
}

template <int registers>
inline void setmaxnreg_inc() {
  static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256, "8 registers at a time, 24 to 256");
  emulated::setmaxnreg(registers, true);
}

}  // namespace ptx
