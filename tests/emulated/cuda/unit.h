// emulated: what a program's unit says of its kernels.
#pragma once

namespace emulated {

using Entry = void (*)(const void* argument);

// The kernel of a name; null if there is none.
Entry entry_of(const char* name);

}  // namespace emulated
