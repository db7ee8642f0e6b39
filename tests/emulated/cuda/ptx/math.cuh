// emulated: cuda_src/ptx/math.cuh. Results are those of exact functions, rounded; the hardware's may differ from them
// by a few units in the last place.
#pragma once

#include "numbers.h"

namespace ptx {

inline float ex2_approx_ftz(float x) { return emulated::canonical(emulated::flush(exp2f(x))); }
inline float lg2_approx(float x) { return emulated::canonical(log2f(x)); }
inline float rcp_approx_ftz(float x) { return emulated::canonical(emulated::flush(1.0f / emulated::flush(x))); }
inline float min_nan(float a, float b) { return a != a || b != b ? emulated::canonical(a + b) : a < b ? a : b; }

}  // namespace ptx
