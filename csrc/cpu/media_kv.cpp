// Host side of media_kv on the CPU: keys and values of all layers from one matmul over the media, whose rows are
// normalised once; each layer's affine w, b is folded into its weight W as it is packed: x̂ (W diag(w))ᵀ + W b. Keys and
// values of a layer are tensors of their own, and so are their gradients, which are read where they lie.
//
// Backward, with P = d_outᵀ x̂ of a layer and s the column sums of its d_out:
//
//   d_media through Σ d_out W diag(w),  dW = P diag(w) + s bᵀ,  dw = Σ P ∘ W over W's rows,  db = Wᵀ s
//
// Shapes and dtypes are checked by flamingo_kernels/ops/media_kv.py.

#include <ATen/ATen.h>

#include "linear_host.h"
#include "ops.h"

namespace flamingo {
namespace {

std::vector<at::Tensor> all_wide(const std::vector<at::Tensor>& vectors, const at::Tensor& weight) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& x : vectors) result.push_back(wide(x, weight));
  return result;
}

std::vector<at::Tensor> all_rows(const std::vector<at::Tensor>& matrices) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& x : matrices) result.push_back(as_rows(x));
  return result;
}

std::vector<LinearPart> parts_of(const std::vector<at::Tensor>& weights, const std::vector<at::Tensor>& scales) {
  std::vector<LinearPart> parts;
  for (size_t i = 0; i < weights.size(); ++i) {
    parts.push_back({matrix_of(weights[i]), scales.empty() ? nullptr : array_of(scales[i])});
  }
  return parts;
}

// The norm without its affine; none at all where `norms` is false.
std::optional<RowNorm> statistics(bool norms, const at::Tensor& media, double eps, const at::Tensor& weight) {
  if (!norms) return std::nullopt;
  return std::make_optional<RowNorm>(media, "layer", eps, std::nullopt, std::nullopt, weight);
}

}  // namespace

std::vector<at::Tensor> media_kv_forward(const at::Tensor& media_, const std::vector<at::Tensor>& weights_,
                                         const std::vector<at::Tensor>& norm_weights,
                                         const std::vector<at::Tensor>& norm_biases, double eps) {
  const at::Tensor media = as_rows(media_);
  const std::vector<at::Tensor> weights = all_rows(weights_);
  const auto scales = all_wide(norm_weights, weights[0]), biases = all_wide(norm_biases, weights[0]);
  const Compute compute = compute_of(weights[0]);
  const auto norm = statistics(!scales.empty(), media, eps, weights[0]);

  LinearArgs args{matrix_of(media), norm ? norm->args() : Norm{}, parts_of(weights, scales)};
  std::vector<at::Tensor> parts, folded;  // keys and values; W b of each layer
  const auto new_part = [&](int64_t columns) {
    const at::Tensor rows = at::empty({media.size(0), columns}, weights[0].options());
    std::vector<int64_t> sizes(media_.sizes().begin(), media_.sizes().end());
    sizes.back() = columns;
    parts.push_back(rows.view(sizes));
    return matrix_of(rows);
  };
  for (size_t i = 0; i < weights.size(); ++i) {
    if (norm) {
      folded.push_back(empty_wide({weights[i].size(0)}, weights[i]));
      linear_kernels().row_dots(compute, matrix_of(weights[i]), array_of(biases[i]), folded[i].mutable_data_ptr());
      args.parts[i].bias = array_of(folded[i]);
    }
    args.parts[i].out = new_part(weights[i].size(0) / 2);
    args.parts[i].rest = new_part(weights[i].size(0) / 2);
  }
  linear_kernels().linear(compute, args);
  return parts;
}

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>> media_kv_backward(
    const std::vector<at::Tensor>& d_parts_, const at::Tensor& media_, const std::vector<at::Tensor>& weights_,
    const std::vector<at::Tensor>& norm_weights, const std::vector<at::Tensor>& norm_biases, double eps,
    const std::vector<bool>& wanted) {
  const at::Tensor media = as_rows(media_);
  const std::vector<at::Tensor> weights = all_rows(weights_), d_parts = all_rows(d_parts_);
  std::vector<Matrix> d_out;
  for (const at::Tensor& d_part : d_parts) d_out.push_back(matrix_of(d_part));
  const auto scales = all_wide(norm_weights, weights[0]), biases = all_wide(norm_biases, weights[0]);
  const LinearKernels& kernels = linear_kernels();
  const Compute compute = compute_of(weights[0]);
  const auto norm = statistics(!scales.empty(), media, eps, weights[0]);
  const size_t layers = weights.size(), norms = scales.size();

  at::Tensor d_media = unwanted(media);
  if (wanted[0]) {
    const at::Tensor d_rows = norm ? empty_wide(media.sizes(), weights[0]) : at::empty(media.sizes(), media.options());
    InputGradientArgs args{d_out, nullptr, parts_of(weights, scales)};
    args.dx = matrix_of(d_rows);
    kernels.input_gradient(compute, args);
    d_media = d_rows;
    if (norm) {
      d_media = norm_gradients(d_rows, media, *norm, {}, {}, {}, weights[0], {true, false, false})[0];
    }
    d_media = d_media.view(media_.sizes());
  }

  std::vector<at::Tensor> d_weights, d_norm_weights, d_norm_biases;
  for (size_t i = 0; i < layers; ++i) {
    const at::Tensor& weight = weights[i];
    const Matrix &d_keys = d_out[2 * i], &d_values = d_out[2 * i + 1];
    const bool of_weight = wanted[1 + i], of_scale = norm && wanted[1 + layers + i];
    const bool of_bias = norm && wanted[1 + layers + norms + i];
    at::Tensor sums;  // s
    if (norm && (of_weight || of_bias)) {
      sums = empty_wide({2, weight.size(0) / 2}, weight);
      kernels.column_sums(compute, d_keys, nullptr, sums[0].mutable_data_ptr());
      kernels.column_sums(compute, d_values, nullptr, sums[1].mutable_data_ptr());
    }
    d_weights.push_back(unwanted(weight));
    at::Tensor d_scale;
    if (of_weight || of_scale) {
      WeightGradientArgs args{{d_keys, d_values}, matrix_of(media), norm ? norm->args() : Norm{}};
      args.weight = matrix_of(weight);
      if (norm) {
        args.scale = array_of(scales[i]);
        args.bias = array_of(biases[i]);
        args.row_sums = array_of(sums);
      }
      if (of_weight) args.dweight = matrix_of(d_weights[i] = at::empty(weight.sizes(), weight.options()));
      if (of_scale) args.column_dots = (d_scale = empty_wide({weight.size(1)}, weight)).mutable_data_ptr();
      kernels.weight_gradient(compute, args);
    }
    if (!norm) continue;
    d_norm_weights.push_back(of_scale ? d_scale.to(norm_weights[i].scalar_type()) : unwanted(norm_weights[i]));
    d_norm_biases.push_back(unwanted(norm_biases[i]));
    if (of_bias) {
      const at::Tensor d_bias = empty_wide({weight.size(1)}, weight);
      kernels.column_sums(compute, matrix_of(weight), array_of(sums), d_bias.mutable_data_ptr());
      d_norm_biases[i] = d_bias.to(norm_biases[i].scalar_type());
    }
  }
  return {d_media, d_weights, d_norm_weights, d_norm_biases};
}

}  // namespace flamingo
