// emulated: cuda_src/ptx/opaque.cuh.
#pragma once

namespace ptx {

template <class T>
inline const T& opaque(const T& at) {
  return at;
}

template <class T>
inline T* opaque(T* pointer) {
  return pointer;
}

inline int opaque(int x) { return x; }

}  // namespace ptx
