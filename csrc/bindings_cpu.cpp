// The Python module flamingo_kernels._cpu: one submodule per op, with its forward and backward.

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/isa.h"
#include "cpu/ops.h"

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of flamingo_kernels";
  m.def("isa", &flamingo::isa_name, "The instruction set in use: DEFAULT, AVX2 or AVX512");
  m.def("narrow_tiles", &flamingo::narrow_tiles, "Whether bf16 matmuls take bf16 operands rather than widened ones");

  auto op = m.def_submodule("masked_cross_attention");
  op.def("forward", torch::wrap_pybind_function_no_gil(flamingo::masked_cross_attention_forward));
  op.def("backward", torch::wrap_pybind_function_no_gil(flamingo::masked_cross_attention_backward));
}
