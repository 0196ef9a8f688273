// Host side of gated_mlp on the CPU: y = x + tanh(gate) ∘ (act(norm(x) w_inᵀ) w_outᵀ). Forward keeps hidden, the
// activation's input, or nothing; backward makes the normalised rows and the activations again as it packs them. Shapes
// and dtypes are checked by flamingo_kernels/ops/gated_mlp.py.

#include <ATen/ATen.h>

#include <map>

#include "linear_host.h"
#include "ops.h"

namespace flamingo {
namespace {

Activation activation_of(const std::string& name) {
  static const std::map<std::string, Activation> by_name{{"squared_relu", Activation::kSquaredRelu},
                                                         {"gelu", Activation::kGelu},
                                                         {"gelu_tanh", Activation::kGeluTanh},
                                                         {"relu", Activation::kRelu},
                                                         {"silu", Activation::kSilu},
                                                         {"swiglu", Activation::kSwiglu}};
  return by_name.at(name);
}

std::vector<int64_t> hidden_sizes(const at::Tensor& x, const at::Tensor& w_in) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = w_in.size(0);
  return sizes;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> gated_mlp_forward(const at::Tensor& x_, const std::optional<at::Tensor>& norm_weight,
                                                     const std::optional<at::Tensor>& norm_bias,
                                                     const at::Tensor& w_in_, const at::Tensor& w_out_,
                                                     const std::optional<at::Tensor>& gate,
                                                     const std::string& activation, const std::string& norm, double eps,
                                                     bool save_hidden) {
  const at::Tensor x = as_rows(x_), w_in = as_rows(w_in_), w_out = as_rows(w_out_);
  at::Tensor y = at::empty(x_.sizes(), x_.options());
  at::Tensor hidden = save_hidden ? at::empty(hidden_sizes(x_, w_in), w_in.options()) : unwanted(w_in);
  const RowNorm rows(x, norm, eps, norm_weight, norm_bias, w_in);
  const at::Tensor opened = open_gate(gate, w_out.size(0), w_out);
  MlpArgs args{matrix_of(x), rows.args(), matrix_of(w_in), matrix_of(w_out), activation_of(activation)};
  args.gate = array_of(opened);
  if (save_hidden) args.hidden = matrix_of(hidden.view({x.size(0), w_in.size(0)}));
  args.out = matrix_of(y.view(x.sizes()));
  linear_kernels().mlp(compute_of(w_in), args);
  return {y, hidden};
}

std::vector<at::Tensor> gated_mlp_backward(const at::Tensor& dy_, const at::Tensor& x_, const at::Tensor& hidden_,
                                           const std::optional<at::Tensor>& norm_weight,
                                           const std::optional<at::Tensor>& norm_bias, const at::Tensor& w_in_,
                                           const at::Tensor& w_out_, const std::optional<at::Tensor>& gate,
                                           const std::string& activation, const std::string& norm, double eps,
                                           const std::vector<bool>& wanted) {
  const at::Tensor dy = as_rows(dy_), x = as_rows(x_), w_in = as_rows(w_in_), w_out = as_rows(w_out_);
  const LinearKernels& kernels = linear_kernels();
  const Compute compute = compute_of(w_in);
  const RowNorm rows(x, norm, eps, norm_weight, norm_bias, w_in);
  const at::Tensor opened = open_gate(gate, w_out.size(0), w_out);
  const Activation act = activation_of(activation);
  std::vector<at::Tensor> gradients{
      unwanted(x),     unwanted(norm_weight.value_or(x)), unwanted(norm_bias.value_or(x)), unwanted(w_in),
      unwanted(w_out), unwanted(gate.value_or(x))};

  at::Tensor hidden = hidden_;
  if (hidden.dim() == 1) {  // not saved
    hidden = at::empty({x.size(0), w_in.size(0)}, w_in.options());
    kernels.linear(compute, {matrix_of(x), rows.args(), {{matrix_of(w_in), nullptr, nullptr, matrix_of(hidden)}}});
  }
  hidden = as_rows(hidden);

  if (wanted[4] || wanted[5]) {
    WeightGradientArgs args{{matrix_of(dy)}, matrix_of(hidden)};
    args.activation = act;
    args.weight = matrix_of(w_out);
    args.gate = array_of(opened);
    at::Tensor sums;
    if (wanted[4]) args.dweight = matrix_of(gradients[4] = at::empty(w_out.sizes(), w_out.options()));
    if (wanted[5]) args.row_dots = (sums = empty_wide({w_out.size(0)}, w_out)).mutable_data_ptr();
    kernels.weight_gradient(compute, args);
    if (wanted[5]) gradients[5] = gate_gradient(*gate, opened, sums);
  }

  const bool of_norm = wanted[0] || wanted[1] || wanted[2];
  if (!of_norm && !wanted[3]) return gradients;
  at::Tensor d_hidden = at::empty(hidden.sizes(), hidden.options());
  InputGradientArgs through_w_out{{matrix_of(dy)}, array_of(opened), {{matrix_of(w_out)}}, act, matrix_of(hidden)};
  through_w_out.dx = matrix_of(d_hidden);
  kernels.input_gradient(compute, through_w_out);
  hidden.reset();

  if (wanted[3]) {
    WeightGradientArgs args{{matrix_of(d_hidden)}, matrix_of(x), rows.args()};
    args.weight = matrix_of(w_in);
    args.dweight = matrix_of(gradients[3] = at::empty(w_in.sizes(), w_in.options()));
    kernels.weight_gradient(compute, args);
  }
  if (of_norm) {
    const at::Tensor dz = empty_wide(x.sizes(), w_in);
    InputGradientArgs through_w_in{{matrix_of(d_hidden)}, nullptr, {{matrix_of(w_in)}}};
    through_w_in.dx = matrix_of(dz);
    kernels.input_gradient(compute, through_w_in);
    const auto of_rows = norm_gradients(dz, x, rows, norm_weight, norm_bias, dy, w_in, wanted);
    std::copy(of_rows.begin(), of_rows.end(), gradients.begin());
    if (wanted[0]) gradients[0] = gradients[0].view(x_.sizes());
  }
  return gradients;
}

}  // namespace flamingo
