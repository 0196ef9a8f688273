#include "linear_host.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include "isa.h"

namespace flamingo {

const LinearKernels& linear_kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::kAvx512:
      return AVX512::linear_kernels;
    case Isa::kAvx2:
      return AVX2::linear_kernels;
    default:
      break;
  }
#endif
  return DEFAULT::linear_kernels;
}

Compute compute_of(const at::Tensor& weight) { return {weight.scalar_type(), narrow_tiles()}; }

at::Tensor as_rows(const at::Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  const at::Tensor flat = x.reshape({rows, x.size(-1)});
  return flat.stride(1) == 1 || flat.size(1) == 1 ? flat : flat.contiguous();
}

Matrix matrix_of(const at::Tensor& x) {
  if (!x.defined()) return {};
  // An empty tensor has no memory, but is there.
  static char nothing[64];
  void* data = x.numel() ? const_cast<void*>(x.const_data_ptr()) : nothing;
  return {data, x.scalar_type(), x.size(0), x.size(1), x.stride(0)};
}

at::Tensor wide(const std::optional<at::Tensor>& x, const at::Tensor& weight) {
  if (!x) return {};
  return x->to(at::toOpMathType(weight.scalar_type())).contiguous();
}

const void* array_of(const at::Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }

at::Tensor empty_wide(at::IntArrayRef sizes, const at::Tensor& weight) {
  return at::empty(sizes, weight.options().dtype(at::toOpMathType(weight.scalar_type())));
}

at::Tensor unwanted(const at::Tensor& input) { return at::empty({0}, input.options()); }

at::Tensor open_gate(const std::optional<at::Tensor>& gate, int64_t channels, const at::Tensor& weight) {
  if (!gate) return {};
  return wide(gate, weight).tanh().reshape({-1}).expand({channels}).contiguous();
}

at::Tensor gate_gradient(const at::Tensor& gate, const at::Tensor& opened, const at::Tensor& sums) {
  const at::Tensor per_channel = (1 - opened * opened) * sums;
  return (gate.numel() == sums.numel() ? per_channel : per_channel.sum()).reshape(gate.sizes()).to(gate.scalar_type());
}

RowNorm::RowNorm(const at::Tensor& x, const std::string& kind, double eps, const std::optional<at::Tensor>& norm_weight,
                 const std::optional<at::Tensor>& norm_bias, const at::Tensor& weight)
    : mean_(empty_wide({x.size(0)}, weight)),
      rstd_(empty_wide({x.size(0)}, weight)),
      weight_(wide(norm_weight, weight)),
      bias_(wide(norm_bias, weight)) {
  args_ = {kind == "rms" ? NormKind::kRms : NormKind::kLayer,
           eps,
           mean_.mutable_data_ptr(),
           rstd_.mutable_data_ptr(),
           array_of(weight_),
           array_of(bias_)};
  linear_kernels().norm_statistics(compute_of(weight), matrix_of(x), args_);
}

std::vector<at::Tensor> norm_gradients(const at::Tensor& d_normalised, const at::Tensor& x, const RowNorm& norm,
                                       const std::optional<at::Tensor>& norm_weight,
                                       const std::optional<at::Tensor>& norm_bias, const at::Tensor& residual,
                                       const at::Tensor& weight, const std::vector<bool>& wanted) {
  NormBackwardArgs args{matrix_of(d_normalised), matrix_of(x), norm.args(), matrix_of(residual), {}, nullptr, nullptr};
  at::Tensor dx, dweight, dbias;
  if (wanted[0]) args.dx = matrix_of(dx = at::empty(x.sizes(), x.options()));
  if (wanted[1]) args.dweight = (dweight = empty_wide({x.size(1)}, weight)).mutable_data_ptr();
  if (wanted[2]) args.dbias = (dbias = empty_wide({x.size(1)}, weight)).mutable_data_ptr();
  linear_kernels().norm_backward(compute_of(weight), args);
  const auto narrowed = [](const at::Tensor& gradient, const std::optional<at::Tensor>& input, const at::Tensor& x) {
    if (gradient.defined()) return gradient.to(input->scalar_type());
    return unwanted(input ? *input : x);
  };
  return {wanted[0] ? dx : unwanted(x), narrowed(dweight, norm_weight, x), narrowed(dbias, norm_bias, x)};
}

}  // namespace flamingo
