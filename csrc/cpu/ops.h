// The CPU ops that bindings_cpu.cpp gives to Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace flamingo {

// q [B, T, H, D]; k, v [B', K, G, D]; start, end int32 [B, T] -> o [B, T, H, D], lse [B, H, T].
std::tuple<at::Tensor, at::Tensor> masked_cross_attention_forward(const at::Tensor& q, const at::Tensor& k,
                                                                  const at::Tensor& v, const at::Tensor& start,
                                                                  const at::Tensor& end, double softmax_scale);

// -> dq, dk, dv, contiguous.
std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_cross_attention_backward(
    const at::Tensor& d_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start,
    const at::Tensor& end, const at::Tensor& o, const at::Tensor& lse, double softmax_scale);

}  // namespace flamingo
