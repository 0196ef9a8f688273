// The Python module flamingo_kernels._cuda: one submodule per op. It knows no tensors, only addresses, sizes, strides
// and a stream, and links no libtorch, so that one binary serves every torch. `emulated`: the kernels run on the CPU.

#include <pybind11/pybind11.h>

#include "cuda/bindings.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of flamingo_kernels";
#ifdef FLAMINGO_EMULATED
  m.attr("emulated") = true;
#else
  m.attr("emulated") = false;
#endif
  flamingo::bind_latent_attention(m);
  flamingo::bind_masked_cross_attention(m);
  flamingo::bind_rows(m);
}
