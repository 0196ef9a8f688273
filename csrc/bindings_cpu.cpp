// The Python module flamingo_kernels._cpu: one submodule per op, with its forward and backward.

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/isa.h"
#include "cpu/ops.h"

namespace {

template <typename Forward, typename Backward>
void define(pybind11::module_& m, const char* op, const Forward& forward, const Backward& backward) {
  auto submodule = m.def_submodule(op);
  submodule.def("forward", torch::wrap_pybind_function_no_gil(forward));
  submodule.def("backward", torch::wrap_pybind_function_no_gil(backward));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of flamingo_kernels";
  m.def("isa", &flamingo::isa_name, "The instruction set in use: DEFAULT, AVX2 or AVX512");
  m.def("narrow_tiles", &flamingo::narrow_tiles, "Whether bf16 matmuls take bf16 operands rather than widened ones");

  using namespace flamingo;
  define(m, "masked_cross_attention", masked_cross_attention_forward, masked_cross_attention_backward);
  define(m, "latent_attention", latent_attention_forward, latent_attention_backward);
  define(m, "norm_linear", norm_linear_forward, norm_linear_backward);
  define(m, "linear_gate_residual", linear_gate_residual_forward, linear_gate_residual_backward);
  define(m, "gated_cross_attention", gated_cross_attention_forward, gated_cross_attention_backward);
  define(m, "gated_mlp", gated_mlp_forward, gated_mlp_backward);
  define(m, "media_kv", media_kv_forward, media_kv_backward);
}
