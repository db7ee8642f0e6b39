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

// The two halves of that, for grids whose blocks have something to do before they need what the grid before has
// written. Some block of a grid must wait before it ends.
inline void grid_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

inline void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" :::);
#endif
}

}  // namespace ptx
