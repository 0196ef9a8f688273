// Host side of masked_cross_attention on the CPU. Shapes and dtypes are checked by
// flamingo_kernels/ops/masked_cross_attention.py.

#include <ATen/ATen.h>

#include "attention_host.h"
#include "ops.h"
#include "plan.h"

namespace flamingo {
namespace {

void check_within_keys(int64_t keys, const at::Tensor& start_, const at::Tensor& end_) {
  const at::Tensor start = start_.contiguous(), end = end_.contiguous();
  const auto *starts = start.const_data_ptr<int32_t>(), *ends = end.const_data_ptr<int32_t>();
  const int64_t outside = first_outside(start.numel(), keys, starts, ends);
  TORCH_CHECK_VALUE(outside < 0, "masked_cross_attention: intervals must lie within 0..", keys,
                    ", the key axis, got start ", starts[outside], " and end ", ends[outside], " at row ",
                    outside / start.size(1), ", token ", outside % start.size(1));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> masked_cross_attention_forward(const at::Tensor& q, const at::Tensor& k,
                                                                  const at::Tensor& v, const at::Tensor& start,
                                                                  const at::Tensor& end, double softmax_scale) {
  check_within_keys(k.size(1), start, end);
  return attention_forward(q, {KeysValues{k, v}}, start, end, softmax_scale);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_cross_attention_backward(
    const at::Tensor& d_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start,
    const at::Tensor& end, const at::Tensor& o, const at::Tensor& lse, double softmax_scale) {
  check_within_keys(k.size(1), start, end);
  const auto [dq, gradients] = attention_backward(d_out, q, {KeysValues{k, v}}, start, end, o, lse, softmax_scale);
  return {dq, gradients[0].k, gradients[0].v};
}

}  // namespace flamingo
