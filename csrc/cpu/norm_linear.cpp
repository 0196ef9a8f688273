// Host side of norm_linear on the CPU: y = norm(x) weightᵀ. Shapes and dtypes are checked by
// flamingo_kernels/ops/norm_linear.py.

#include <ATen/ATen.h>

#include "linear_host.h"
#include "ops.h"

namespace flamingo {
namespace {

std::vector<int64_t> with_last(at::IntArrayRef sizes, int64_t last) {
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  result.back() = last;
  return result;
}

}  // namespace

at::Tensor norm_linear_forward(const at::Tensor& x_, const std::optional<at::Tensor>& norm_weight,
                               const std::optional<at::Tensor>& norm_bias, const at::Tensor& weight_,
                               const std::string& norm, double eps) {
  const at::Tensor x = as_rows(x_), weight = as_rows(weight_);
  at::Tensor y = at::empty({x.size(0), weight.size(0)}, weight.options());
  const RowNorm rows(x, norm, eps, norm_weight, norm_bias, weight);
  LinearArgs args{matrix_of(x), rows.args(), {{matrix_of(weight), nullptr, nullptr, matrix_of(y)}}};
  linear_kernels().linear(compute_of(weight), args);
  return y.view(with_last(x_.sizes(), weight.size(0)));
}

std::vector<at::Tensor> norm_linear_backward(const at::Tensor& dy, const at::Tensor& x,
                                             const std::optional<at::Tensor>& norm_weight,
                                             const std::optional<at::Tensor>& norm_bias, const at::Tensor& weight,
                                             const std::string& norm, double eps, const std::vector<bool>& wanted) {
  return norm_linear_gradients(dy, x, norm_weight, norm_bias, weight, norm, eps, {}, wanted);
}

std::vector<at::Tensor> norm_linear_gradients(const at::Tensor& dy_, const at::Tensor& x_,
                                              const std::optional<at::Tensor>& norm_weight,
                                              const std::optional<at::Tensor>& norm_bias, const at::Tensor& weight_,
                                              const std::string& norm, double eps, const at::Tensor& residual,
                                              const std::vector<bool>& wanted) {
  const at::Tensor dy = as_rows(dy_), x = as_rows(x_), weight = as_rows(weight_);
  const RowNorm rows(x, norm, eps, norm_weight, norm_bias, weight);
  std::vector<at::Tensor> gradients{unwanted(x), unwanted(norm_weight.value_or(x)), unwanted(norm_bias.value_or(x)),
                                    unwanted(weight)};
  if (wanted[0] || wanted[1] || wanted[2]) {
    const at::Tensor dz = empty_wide(x.sizes(), weight);
    InputGradientArgs args{{matrix_of(dy)}, nullptr, {{matrix_of(weight)}}};
    args.dx = matrix_of(dz);
    linear_kernels().input_gradient(compute_of(weight), args);
    const auto of_norm = norm_gradients(dz, x, rows, norm_weight, norm_bias, residual, weight, wanted);
    std::copy(of_norm.begin(), of_norm.end(), gradients.begin());
    if (wanted[0]) gradients[0] = gradients[0].view(x_.sizes());
  }
  if (wanted[3]) {
    gradients[3] = at::empty(weight.sizes(), weight.options());
    WeightGradientArgs args{{matrix_of(dy)}, matrix_of(x), rows.args()};
    args.weight = matrix_of(weight);
    args.dweight = matrix_of(gradients[3]);
    linear_kernels().weight_gradient(compute_of(weight), args);
  }
  return gradients;
}

}  // namespace flamingo
