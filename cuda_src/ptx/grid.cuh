// ptx: grids that begin while those before them in the stream end (PTX ISA: "griddepcontrol").
#pragma once

namespace ptx {

// Waits until the grid before has ended and what that has written can be read; does not wait where the launch does not
// overlap with the grid before. Then the next grid, if its launch may overlap with this one, begins as soon as all
// thread blocks have come here and there is room for it. Every thread block calls this first of all: so no grid ends
// before all grids before it have.
inline void grid_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "griddepcontrol.wait;\n"
      "griddepcontrol.launch_dependents;" ::
          : "memory");
#endif
}

}  // namespace ptx
