"""Keys and values of all layers on a GPU: norms folded into the weights, then one matmul.

With x̂ the normalised media, which is the same for all layers, and W_l, w_l, b_l a layer's weight and its norm's

    out_l = (x̂ · w_l + b_l) W_lᵀ = x̂ (W_l · w_l)ᵀ + W_l b_l

so a layer's norm costs a pass over its weight, not one over the media. Backward, with P_l = dout_lᵀ x̂ and
s_l = Σ dout_l over all rows, needs no more of the media than x̂:

    dW_l = P_l · w_l + s_l b_lᵀ,   dx̂ = Σ_l dout_l (W_l · w_l)
    dw_l = Σ W_l ∘ P_l,   db_l = Σ W_l · s_l   over the rows of W_l
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flamingo_kernels._gpu.kernels import Kernels
from flamingo_kernels._gpu.rows import check_dtype, contiguous, gradients, matmul, rows_of

_OP = "media_kv"


def forward(
    kernels: Kernels,
    media: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    eps: float,
) -> Tensor:
    """out [..., Σ 2·G·D] in the weights' dtype. Shapes as in the public op.

    Raises:
        TypeError: fp64, which these kernels do not have.
    """
    check_dtype(kernels.BACKEND, _OP, "weights[0]", weights[0])
    if norm_weights:
        x_hat, _ = kernels.normalize(rows_of(media), None, None, "layer", eps, weights[0].dtype)
        folded, offset = _fold(kernels, weights, norm_weights, norm_biases)
        out = torch.addmm(offset, x_hat, folded.T)
    else:
        out = rows_of(media.to(weights[0].dtype)) @ _joined(weights).T
    return out.view(*media.shape[:-1], out.shape[1])


def backward(
    kernels: Kernels,
    dout: Tensor,
    media: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """dmedia, dweights, dnorm_weights, dnorm_biases; empty where not wanted. `wanted`: in the order of the results."""
    check_dtype(kernels.BACKEND, _OP, "weights[0]", weights[0])
    layers, of_media = len(weights), wanted[0]
    of_layer = [any(wanted[1 + i :: layers]) for i in range(layers)]  # its weight or norm
    d, flat, dtype = rows_of(dout), rows_of(media), weights[0].dtype
    x, dmedia = flat, None
    if norm_weights and of_media:
        dx_hat = matmul(d, _fold(kernels, weights, norm_weights, norm_biases)[0], media.dtype)
        z = dtype if any(of_layer) else None
        dmedia, x, _ = kernels.norm_backward(
            dx_hat, flat, None, None, "layer", eps, residual=None, dx=True, z=z, sums=False
        )
    elif norm_weights and any(of_layer):
        x, _ = kernels.normalize(flat, None, None, "layer", eps, dtype)
    elif of_media:
        dmedia = matmul(d, _joined(weights), media.dtype)

    found = [None] * len(wanted[1:])
    parts = d.split([weight.shape[0] for weight in weights], 1)
    for i, part in enumerate(parts):
        if of_layer[i] and norm_weights:
            layer = (weights[i], norm_weights[i], norm_biases[i])
            found[i::layers] = _unfold(kernels, part, x, *layer, wanted[1 + i :: layers])
        elif of_layer[i]:
            found[i] = part.T @ x.to(dtype)
    inputs = (media, *weights, *norm_weights, *norm_biases)
    dmedia, *lists = gradients(inputs, (None if dmedia is None else dmedia.view(media.shape), *found))
    return dmedia, lists[:layers], lists[layers : 2 * layers], lists[2 * layers :]


def _joined(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def _fold(
    kernels: Kernels, weights: Sequence[Tensor], norm_weights: Sequence[Tensor], norm_biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """W_l · w_l and W_l b_l of all layers: [Σ 2·G·D, V] and [Σ 2·G·D]."""
    sizes = [weight.shape[0] for weight in weights]
    folded, offset = weights[0].new_empty((sum(sizes), weights[0].shape[1])), weights[0].new_empty(sum(sizes))
    outputs = zip(folded.split(sizes), offset.split(sizes), strict=True)
    for weight, *norm, output in zip(weights, norm_weights, norm_biases, outputs, strict=True):
        kernels.fold(weight, *contiguous(*norm), *output)
    return folded, offset


def _unfold(
    kernels: Kernels, d: Tensor, x_hat: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dweight, dscale and dbias of a layer; None where not wanted. d [rows, 2·G·D], x_hat [rows, V]."""
    p, s = matmul(d.T, x_hat, scale.dtype), d.sum(0, dtype=torch.float32)
    return kernels.unfold(p, s, weight, *contiguous(scale, bias), wanted)
