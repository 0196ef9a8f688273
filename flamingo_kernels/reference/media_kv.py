"""Keys and values of all layers in plain PyTorch, in fp32, in fp64 for fp64.

    out = [z_l W_lᵀ for all layers l],   z_l = x̂ · norm_weight_l + norm_bias_l,   x̂ the normalised media (`_norm.py`)

Without norms z_l is the media itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flamingo_kernels.reference import _linear, _norm


def forward(
    media: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    eps: float,
) -> Tensor:
    """out [..., Σ 2·G·D] in the weights' dtype. Shapes as in the public op."""
    x_hat, _, layers = _widen(media, weights, norm_weights, norm_biases, eps)
    out = torch.cat([_norm.affine(x_hat, scale, bias) @ weight.T for weight, scale, bias in layers], -1)
    return out.to(weights[0].dtype)


def backward(
    dout: Tensor,
    media: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """dmedia, dweights, dnorm_weights, dnorm_biases; empty where not wanted. `wanted`: in the order of the results.

    With dz_l = dout_l W_l:  dx̂ = Σ dz_l · norm_weight_l,  dW_l = dout_lᵀ z_l,
    dnorm_weight_l = Σ dz_l · x̂,  dnorm_bias_l = Σ dz_l  over all rows; dmedia as in `_norm`.
    """
    x_hat, rstd, layers = _widen(media, weights, norm_weights, norm_biases, eps)
    parts = dout.to(x_hat.dtype).split([weight.shape[0] for weight in weights], -1)
    of_media, of_weights = wanted[0], wanted[1 : 1 + len(weights)]
    of_norms = wanted[1 + len(weights) :] or [False] * 2 * len(weights)
    of_scales, of_biases = of_norms[: len(weights)], of_norms[len(weights) :]

    dmedia = torch.zeros_like(x_hat) if of_media else None
    dweights, dscales, dbiases = ([None] * len(weights) for _ in range(3))
    for i, (d, (weight, scale, bias)) in enumerate(zip(parts, layers, strict=True)):
        if of_media or of_scales[i] or of_biases[i]:
            dz = d @ weight
        if of_media:
            dmedia = dmedia + _norm.affine(dz, scale, None)
        if of_weights[i]:
            dweights[i] = _linear.rows(d).T @ _linear.rows(_norm.affine(x_hat, scale, bias))
        if of_scales[i]:
            dscales[i] = _linear.rows(dz * x_hat).sum(0)
        if of_biases[i]:
            dbiases[i] = _linear.rows(dz).sum(0)
    if of_media and norm_weights:
        dmedia = _norm.backward(dmedia, x_hat, rstd, None, "layer")
    norms = len(norm_weights)
    return (
        *_linear.gradients([media], [dmedia]),
        list(_linear.gradients(weights, dweights)),
        list(_linear.gradients(norm_weights, dscales[:norms])),
        list(_linear.gradients(norm_biases, dbiases[:norms])),
    )


def _widen(
    media: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor | None, list[tuple[Tensor | None, ...]]]:
    """x̂ (the media itself without norms), its factor 1 / sqrt(var + eps), and each layer's weight, scale and bias."""
    (x,) = _linear.widen(weights[0], media)
    rstd = None
    if norm_weights:
        x, rstd = _norm.normalize(x, "layer", eps)
    none = [None] * len(weights)
    parameters = zip(weights, norm_weights or none, norm_biases or none, strict=True)
    return x, rstd, [tuple(_linear.widen(weights[0], *layer)) for layer in parameters]
