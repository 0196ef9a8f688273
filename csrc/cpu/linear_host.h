// What the host sides of the linear ops share: tensors as matrices, norms and gates as arrays of the accumulation type.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "linear.h"

namespace flamingo {

const LinearKernels& linear_kernels();

// How matmuls with this weight are done.
Compute compute_of(const at::Tensor& weight);

// [..., columns] as [rows, columns] with a contiguous last dimension; a copy only where there is no such view.
at::Tensor as_rows(const at::Tensor& x);

// Of a 2-d tensor with a contiguous last dimension. Kernels write only to tensors that were made for it.
Matrix matrix_of(const at::Tensor& x);

// A vector in the accumulation type of `weight`; undefined where there is none.
at::Tensor wide(const std::optional<at::Tensor>& x, const at::Tensor& weight);
const void* array_of(const at::Tensor& x);

at::Tensor empty_wide(at::IntArrayRef sizes, const at::Tensor& weight);

// The gradient of an input that needs none.
at::Tensor unwanted(const at::Tensor& input);

// tanh(gate), one element for each of `channels`; undefined without a gate.
at::Tensor open_gate(const std::optional<at::Tensor>& gate, int64_t channels, const at::Tensor& weight);

// The gate's gradient from Σ P ∘ W per channel: (1 - tanh² gate) · sums, added up where one gate serves all channels.
at::Tensor gate_gradient(const at::Tensor& gate, const at::Tensor& opened, const at::Tensor& sums);

// The norm of the rows of x, with its statistics taken. Keeps the arrays alive that `args` points to.
class RowNorm {
 public:
  RowNorm(const at::Tensor& x, const std::string& kind, double eps, const std::optional<at::Tensor>& norm_weight,
          const std::optional<at::Tensor>& norm_bias, const at::Tensor& weight);
  const Norm& args() const { return args_; }

 private:
  at::Tensor mean_, rstd_, weight_, bias_;
  Norm args_;
};

// Gradients of x, norm_weight and norm_bias from `d_normalised`, the gradient of the norm's output; `residual` (or
// none) is added to that of x. `wanted` says which; the others are empty.
std::vector<at::Tensor> norm_gradients(const at::Tensor& d_normalised, const at::Tensor& x, const RowNorm& norm,
                                       const std::optional<at::Tensor>& norm_weight,
                                       const std::optional<at::Tensor>& norm_bias, const at::Tensor& residual,
                                       const at::Tensor& weight, const std::vector<bool>& wanted);

// norm_linear_backward with the rows of `residual` (or none) added to the gradient of x.
std::vector<at::Tensor> norm_linear_gradients(const at::Tensor& dy, const at::Tensor& x,
                                              const std::optional<at::Tensor>& norm_weight,
                                              const std::optional<at::Tensor>& norm_bias, const at::Tensor& weight,
                                              const std::string& norm, double eps, const at::Tensor& residual,
                                              const std::vector<bool>& wanted);

}  // namespace flamingo
