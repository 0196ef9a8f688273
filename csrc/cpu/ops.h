// The CPU ops that bindings_cpu.cpp gives to Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace flamingo {

// q [B, T, H, D]; k, v [B', K, G, D]; start, end int32 [B, T] -> o [B, T, H, D], lse [B, H, T].
std::tuple<at::Tensor, at::Tensor> masked_cross_attention_forward(const at::Tensor& q, const at::Tensor& k,
                                                                  const at::Tensor& v, const at::Tensor& start,
                                                                  const at::Tensor& end, double softmax_scale);

// -> dq, dk, dv, contiguous.
std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_cross_attention_backward(
    const at::Tensor& d_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start,
    const at::Tensor& end, const at::Tensor& o, const at::Tensor& lse, double softmax_scale);

// q [N, R, H, D]; media keys and values [N, S, G, D], latent ones [N, R', G, D]; media_lengths int32 [N]
// -> o [N, R, H, D], lse [N, H, R].
std::tuple<at::Tensor, at::Tensor> latent_attention_forward(const at::Tensor& q, const at::Tensor& k_media,
                                                            const at::Tensor& v_media, const at::Tensor& k_latents,
                                                            const at::Tensor& v_latents,
                                                            const std::optional<at::Tensor>& media_lengths,
                                                            double softmax_scale);

// -> dq, dk_media, dv_media, dk_latents, dv_latents, contiguous.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> latent_attention_backward(
    const at::Tensor& d_out, const at::Tensor& q, const at::Tensor& k_media, const at::Tensor& v_media,
    const at::Tensor& k_latents, const at::Tensor& v_latents, const std::optional<at::Tensor>& media_lengths,
    const at::Tensor& o, const at::Tensor& lse, double softmax_scale);

// Of the linear ops. `wanted`: which gradients; the others come back empty.

// x [..., C]; norm_weight, norm_bias [C]; weight [N, C] -> y [..., N].
at::Tensor norm_linear_forward(const at::Tensor& x, const std::optional<at::Tensor>& norm_weight,
                               const std::optional<at::Tensor>& norm_bias, const at::Tensor& weight,
                               const std::string& norm, double eps);

// -> gradients of x, norm_weight, norm_bias, weight.
std::vector<at::Tensor> norm_linear_backward(const at::Tensor& dy, const at::Tensor& x,
                                             const std::optional<at::Tensor>& norm_weight,
                                             const std::optional<at::Tensor>& norm_bias, const at::Tensor& weight,
                                             const std::string& norm, double eps, const std::vector<bool>& wanted);

// x [..., K]; weight [C, K]; residual [..., C]; gate [], [1] or [C] -> y [..., C].
at::Tensor linear_gate_residual_forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& residual,
                                        const std::optional<at::Tensor>& gate);

// -> gradients of x, weight, gate.
std::vector<at::Tensor> linear_gate_residual_backward(const at::Tensor& dy, const at::Tensor& x,
                                                      const at::Tensor& weight, const std::optional<at::Tensor>& gate,
                                                      const std::vector<bool>& wanted);

// x [B, T, C]; w_q [H·D, C]; k, v [B', K, G, D]; start, end int32 [B, T]; w_out [C, H·D]
// -> y [B, T, C], nothing in place of the queries, o [B, T, H, D], lse [B, H, T].
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gated_cross_attention_forward(
    const at::Tensor& x, const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& norm_bias,
    const at::Tensor& w_q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start, const at::Tensor& end,
    const at::Tensor& w_out, const std::optional<at::Tensor>& gate, const std::string& norm, double eps,
    double softmax_scale);

// -> gradients of x, norm_weight, norm_bias, w_q, k, v, w_out, gate. The queries are computed again; `q` is not read.
std::vector<at::Tensor> gated_cross_attention_backward(
    const at::Tensor& dy, const at::Tensor& x, const std::optional<at::Tensor>& norm_weight,
    const std::optional<at::Tensor>& norm_bias, const at::Tensor& w_q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& start, const at::Tensor& end, const at::Tensor& w_out, const std::optional<at::Tensor>& gate,
    const at::Tensor& q, const at::Tensor& o, const at::Tensor& lse, const std::string& norm, double eps,
    double softmax_scale, const std::vector<bool>& wanted);

// x [..., C]; w_in [F, C] ([2F, C] for swiglu); w_out [C, F] -> y [..., C], hidden [..., F or 2F] or empty.
std::tuple<at::Tensor, at::Tensor> gated_mlp_forward(const at::Tensor& x, const std::optional<at::Tensor>& norm_weight,
                                                     const std::optional<at::Tensor>& norm_bias, const at::Tensor& w_in,
                                                     const at::Tensor& w_out, const std::optional<at::Tensor>& gate,
                                                     const std::string& activation, const std::string& norm, double eps,
                                                     bool save_hidden);

// -> gradients of x, norm_weight, norm_bias, w_in, w_out, gate. An empty `hidden` is computed again.
std::vector<at::Tensor> gated_mlp_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& hidden,
                                           const std::optional<at::Tensor>& norm_weight,
                                           const std::optional<at::Tensor>& norm_bias, const at::Tensor& w_in,
                                           const at::Tensor& w_out, const std::optional<at::Tensor>& gate,
                                           const std::string& activation, const std::string& norm, double eps,
                                           const std::vector<bool>& wanted);

// media [..., V]; per layer a weight [2·N, V] and, unless the lists are empty, norm_weight and norm_bias [V]
// -> per layer keys and values, each [..., N].
std::vector<at::Tensor> media_kv_forward(const at::Tensor& media, const std::vector<at::Tensor>& weights,
                                         const std::vector<at::Tensor>& norm_weights,
                                         const std::vector<at::Tensor>& norm_biases, double eps);

// d_parts: those of keys and values, as forward gives them
// -> gradients of media, weights, norm_weights, norm_biases; `wanted` in that order.
std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>> media_kv_backward(
    const std::vector<at::Tensor>& d_parts, const at::Tensor& media, const std::vector<at::Tensor>& weights,
    const std::vector<at::Tensor>& norm_weights, const std::vector<at::Tensor>& norm_biases, double eps,
    const std::vector<bool>& wanted);

}  // namespace flamingo
