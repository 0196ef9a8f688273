// Where a launch goes: a device and a stream of it, as Python hands them over. Plain C++, for bindings and launchers.
#pragma once

#include <cstdint>

namespace flamingo {

struct Stream {
  int device;    // its ordinal; -1 for CPU tensors, which only emulated kernels take
  void* handle;  // a cudaStream_t
};

}  // namespace flamingo
