// Host side of linear_gate_residual on the CPU: y = residual + tanh(gate) ∘ (x weightᵀ). With P = dyᵀx, the weight's
// gradient is tanh(gate) ∘ P and the gate's is (1 - tanh² gate) Σ P ∘ weight, so one matmul serves both. Shapes and
// dtypes are checked by flamingo_kernels/ops/linear_gate_residual.py.

#include <ATen/ATen.h>

#include "linear_host.h"
#include "ops.h"

namespace flamingo {

at::Tensor linear_gate_residual_forward(const at::Tensor& x_, const at::Tensor& weight_, const at::Tensor& residual_,
                                        const std::optional<at::Tensor>& gate) {
  const at::Tensor x = as_rows(x_), weight = as_rows(weight_), residual = as_rows(residual_);
  at::Tensor y = at::empty(residual.sizes(), residual.options());
  const at::Tensor opened = open_gate(gate, weight.size(0), weight);
  LinearArgs args{matrix_of(x), {}, {{matrix_of(weight), nullptr, nullptr, matrix_of(y)}}};
  args.gate = array_of(opened);
  args.residual = matrix_of(residual);
  linear_kernels().linear(compute_of(weight), args);
  return y.view(residual_.sizes());
}

std::vector<at::Tensor> linear_gate_residual_backward(const at::Tensor& dy_, const at::Tensor& x_,
                                                      const at::Tensor& weight_, const std::optional<at::Tensor>& gate,
                                                      const std::vector<bool>& wanted) {
  const at::Tensor dy = as_rows(dy_), x = as_rows(x_), weight = as_rows(weight_);
  const at::Tensor opened = open_gate(gate, weight.size(0), weight);
  std::vector<at::Tensor> gradients{unwanted(x), unwanted(weight), unwanted(gate.value_or(x))};
  if (wanted[0]) {
    gradients[0] = at::empty(x_.sizes(), x_.options());
    InputGradientArgs args{{matrix_of(dy)}, array_of(opened), {{matrix_of(weight)}}};
    args.dx = matrix_of(gradients[0].view(x.sizes()));
    linear_kernels().input_gradient(compute_of(weight), args);
  }
  if (wanted[1] || wanted[2]) {
    WeightGradientArgs args{{matrix_of(dy)}, matrix_of(x)};
    args.weight = matrix_of(weight);
    args.gate = array_of(opened);
    at::Tensor sums;
    if (wanted[1]) args.dweight = matrix_of(gradients[1] = at::empty(weight.sizes(), weight.options()));
    if (wanted[2]) args.row_dots = (sums = empty_wide({weight.size(0)}, weight)).mutable_data_ptr();
    linear_kernels().weight_gradient(compute_of(weight), args);
    if (wanted[2]) gradients[2] = gate_gradient(*gate, opened, sums);
  }
  return gradients;
}

}  // namespace flamingo
