// Host side of gated_cross_attention on the CPU: norm_linear, masked_cross_attention and linear_gate_residual in a row.
// Backward projects the queries again, 2·B·T·C·H·D operations, rather than keep them from forward. Shapes and dtypes
// are checked by flamingo_kernels/ops/gated_cross_attention.py.

#include <ATen/ATen.h>

#include "linear_host.h"
#include "ops.h"

namespace flamingo {
namespace {

at::Tensor project(const at::Tensor& x, const std::optional<at::Tensor>& norm_weight,
                   const std::optional<at::Tensor>& norm_bias, const at::Tensor& w_q, const std::string& norm,
                   double eps, int64_t head_dim) {
  const at::Tensor q = norm_linear_forward(x, norm_weight, norm_bias, w_q, norm, eps);
  return q.view({x.size(0), x.size(1), w_q.size(0) / head_dim, head_dim});
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gated_cross_attention_forward(
    const at::Tensor& x, const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& norm_bias,
    const at::Tensor& w_q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start, const at::Tensor& end,
    const at::Tensor& w_out, const std::optional<at::Tensor>& gate, const std::string& norm, double eps,
    double softmax_scale) {
  const at::Tensor q = project(x, norm_weight, norm_bias, w_q, norm, eps, k.size(3));
  auto [o, lse] = masked_cross_attention_forward(q, k, v, start, end, softmax_scale);
  return {linear_gate_residual_forward(o.flatten(2), w_out, x, gate), unwanted(q), o, lse};
}

std::vector<at::Tensor> gated_cross_attention_backward(
    const at::Tensor& dy, const at::Tensor& x, const std::optional<at::Tensor>& norm_weight,
    const std::optional<at::Tensor>& norm_bias, const at::Tensor& w_q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& start, const at::Tensor& end, const at::Tensor& w_out, const std::optional<at::Tensor>& gate,
    const at::Tensor& /*q*/, const at::Tensor& o, const at::Tensor& lse, const std::string& norm, double eps,
    double softmax_scale, const std::vector<bool>& wanted) {
  const bool of_queries = wanted[0] || wanted[1] || wanted[2] || wanted[3], of_keys = wanted[4] || wanted[5];
  const auto of_add =
      linear_gate_residual_backward(dy, o.flatten(2), w_out, gate, {of_queries || of_keys, wanted[6], wanted[7]});
  at::Tensor dq, dk = unwanted(k), dv = unwanted(v);
  if (of_queries || of_keys) {
    const at::Tensor q = project(x, norm_weight, norm_bias, w_q, norm, eps, k.size(3));
    std::tie(dq, dk, dv) =
        masked_cross_attention_backward(of_add[0].view(o.sizes()), q, k, v, start, end, o, lse, softmax_scale);
  }
  std::vector<at::Tensor> gradients{unwanted(x), unwanted(norm_weight.value_or(x)), unwanted(norm_bias.value_or(x)),
                                    unwanted(w_q)};
  if (of_queries) {
    gradients = norm_linear_gradients(dq.flatten(2), x, norm_weight, norm_bias, w_q, norm, eps, as_rows(dy),
                                      {wanted[0], wanted[1], wanted[2], wanted[3]});
  }
  gradients.insert(gradients.end(), {wanted[4] ? dk : unwanted(k), wanted[5] ? dv : unwanted(v), of_add[1], of_add[2]});
  return gradients;
}

}  // namespace flamingo
