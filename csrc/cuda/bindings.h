// What the files of bindings share. Each op has one, <op>_bindings.cpp, and a line here and in ../bindings_cuda.cpp.
// From Python come addresses as integers and a tensor with strides as a tuple (address, stride, ...).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "cuda/stream.h"

namespace flamingo {

void bind_latent_attention(pybind11::module_& module);
void bind_masked_cross_attention(pybind11::module_& module);
void bind_rows(pybind11::module_& module);

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (device ordinal or -1, cudaStream_t)
using StreamArg = std::tuple<int, uintptr_t>;

inline Stream stream_of(const StreamArg& arg) { return {std::get<0>(arg), pointer<void>(std::get<1>(arg))}; }

}  // namespace flamingo
