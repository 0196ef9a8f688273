// Host side of latent_attention on the CPU: masked cross-attention over the keys [latents, media], of which every query
// of media n sees the first R' + media_lengths[n]. Shapes and dtypes are checked by
// flamingo_kernels/ops/latent_attention.py.

#include <ATen/ATen.h>

#include "attention_host.h"
#include "ops.h"

namespace flamingo {
namespace {

// The intervals of all queries: start and end, int32 [N, R].
std::tuple<at::Tensor, at::Tensor> visible(const at::Tensor& q, int64_t latents, int64_t tokens,
                                           const std::optional<at::Tensor>& media_lengths) {
  const auto options = q.options().dtype(at::kInt);
  const at::Tensor start = at::zeros({q.size(0), q.size(1)}, options);
  if (!media_lengths) return {start, at::full_like(start, latents + tokens)};
  const at::Tensor lengths = media_lengths->contiguous(), end = at::empty_like(start);
  const auto* length = lengths.const_data_ptr<int32_t>();
  auto* out = end.mutable_data_ptr<int32_t>();
  for (int64_t n = 0; n < q.size(0); ++n) {
    TORCH_CHECK_VALUE(0 <= length[n] && length[n] <= tokens, "latent_attention: media_lengths must lie within 0..",
                      tokens, ", the tokens of a media, got ", length[n], " at media ", n);
    std::fill_n(out + n * q.size(1), q.size(1), static_cast<int32_t>(latents + length[n]));
  }
  return {start, end};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> latent_attention_forward(const at::Tensor& q, const at::Tensor& k_media,
                                                            const at::Tensor& v_media, const at::Tensor& k_latents,
                                                            const at::Tensor& v_latents,
                                                            const std::optional<at::Tensor>& media_lengths,
                                                            double softmax_scale) {
  const auto [start, end] = visible(q, k_latents.size(1), k_media.size(1), media_lengths);
  const KeyAxis keys{KeysValues{k_latents, v_latents}, KeysValues{k_media, v_media}};
  return attention_forward(q, keys, start, end, softmax_scale);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> latent_attention_backward(
    const at::Tensor& d_out, const at::Tensor& q, const at::Tensor& k_media, const at::Tensor& v_media,
    const at::Tensor& k_latents, const at::Tensor& v_latents, const std::optional<at::Tensor>& media_lengths,
    const at::Tensor& o, const at::Tensor& lse, double softmax_scale) {
  const auto [start, end] = visible(q, k_latents.size(1), k_media.size(1), media_lengths);
  const KeyAxis keys{KeysValues{k_latents, v_latents}, KeysValues{k_media, v_media}};
  const auto [dq, gradients] = attention_backward(d_out, q, keys, start, end, o, lse, softmax_scale);
  const auto& [latents, media] = gradients;
  return {dq, media.k, media.v, latents.k, latents.v};
}

}  // namespace flamingo
