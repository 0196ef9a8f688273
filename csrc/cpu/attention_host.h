// The host side that the attention ops share: tensors of heads in, planned and attended, outputs allocated.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

namespace flamingo {

struct KeysValues {
  at::Tensor k, v;  // [B', keys, G, D]
};

// The key axis: the keys of the first, then those of the second, whose tensors may be undefined.
using KeyAxis = std::array<KeysValues, 2>;

// q [B, T, H, D]; start, end int32 [B, T], within the key axis -> o like q, lse [B, H, T].
std::tuple<at::Tensor, at::Tensor> attention_forward(const at::Tensor& q, const KeyAxis& keys, const at::Tensor& start,
                                                     const at::Tensor& end, double softmax_scale);

// -> dq and the gradients of keys and values, contiguous.
std::tuple<at::Tensor, KeyAxis> attention_backward(const at::Tensor& d_out, const at::Tensor& q, const KeyAxis& keys,
                                                   const at::Tensor& start, const at::Tensor& end, const at::Tensor& o,
                                                   const at::Tensor& lse, double softmax_scale);

}  // namespace flamingo
