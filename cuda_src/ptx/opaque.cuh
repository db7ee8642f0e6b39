// ptx: addresses and numbers that the compiler knows nothing about.
#pragma once

namespace ptx {

// The same address. What lies there is not read ahead of this call, before a loop around it for example, to be held in
// registers that are needed for something else.
template <class T>
inline const T& opaque(const T& at) {
  const T* address = &at;
  asm volatile("" : "+l"(address));
  return *address;
}

// The same pointer, which the compiler therefore computes only once.
template <class T>
inline T* opaque(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// The same number. What follows from it is computed anew after this call.
inline int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace ptx
