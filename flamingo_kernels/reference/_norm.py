"""LayerNorm and RMSNorm over the last dimension, and their backward, on tensors of the accumulation dtype.

x̂ = (x - mean(x)) / sqrt(var(x) + eps)   "layer"           x̂ = x / sqrt(mean(x²) + eps)   "rms"
z = x̂ · weight + bias                    either may be None
"""

import torch
from torch import Tensor


def normalize(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """x̂ [..., C] and the factor 1 / sqrt(... + eps) [..., 1]."""
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
        x = x - x.mean(-1, keepdim=True)  # what the first mean was rounded by; nothing is left of a constant row
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """z."""
    z = x_hat if weight is None else x_hat * weight
    return z if bias is None else z + bias


def backward(dz: Tensor, x_hat: Tensor, rstd: Tensor, weight: Tensor | None, norm: str) -> Tensor:
    """dx. With dx̂ = dz · weight: dx = rstd · (dx̂ - mean(dx̂) - x̂ mean(dx̂ · x̂)), for "rms" without mean(dx̂)."""
    dx_hat = affine(dz, weight, None)
    dx = dx_hat - x_hat * (dx_hat * x_hat).mean(-1, keepdim=True)
    if norm == "layer":
        dx = dx - dx_hat.mean(-1, keepdim=True)
    return rstd * dx
