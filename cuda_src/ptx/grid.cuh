// ptx: grids that begin while those before them in the stream end (PTX ISA: "griddepcontrol").
#pragma once

namespace ptx {

// Waits until the grid before has ended and what that has written can be read; does not wait where the launch does not
// overlap with the grid before. Then the next grid, if its launch may overlap with this one, begins as soon as all
// thread blocks have come here and there is room for it. Most kernels call this first of all. Such a grid ends after
// all grids before it have, and lets the next one begin when these have ended, though not itself.
inline void grid_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "griddepcontrol.wait;\n"
      "griddepcontrol.launch_dependents;" ::
          : "memory");
#endif
}

// The two halves of that, for grids whose blocks have something to do before they need what the grid before has
// written, or need nothing of it. Who waits for a grid counts on all grids before that to have ended too. So some block
// of every grid must wait before it ends, and others need not.
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
