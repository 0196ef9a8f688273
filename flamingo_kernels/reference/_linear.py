"""The two linear maps of norm_linear, linear_gate_residual and gated_mlp: one behind a norm, one in front of a gate.

All tensors are of the accumulation dtype here: `widen` brings them to it, `gradients` back.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flamingo_kernels.reference import _norm


def widen(weight: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in the accumulation dtype of an op with this weight: fp64 for fp64, else fp32."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return [None if x is None else x.to(dtype) for x in tensors]


def gradients(inputs: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """What a backward returns: contiguous, of its input's dtype, and of shape [0] where no gradient is wanted."""
    return tuple(
        (inputs[0] if x is None else x).new_empty(0) if dx is None else dx.to(x.dtype).contiguous()
        for x, dx in zip(inputs, values, strict=True)
    )


def norm_linear(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor, norm: str, eps: float
) -> Tensor:
    """norm(x) weightᵀ: [..., C] to [..., N]."""
    x_hat, _ = _norm.normalize(x, norm, eps)
    return _norm.affine(x_hat, norm_weight, norm_bias) @ weight.T


def norm_linear_backward(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    norm: str,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """dx, dnorm_weight, dnorm_bias, dweight; None where not wanted. With z = norm(x) = x̂ · norm_weight + norm_bias:

    dweight = dyᵀ z,  dz = dy weight,  dnorm_weight = Σ dz · x̂,  dnorm_bias = Σ dz  over all rows; dx as in `_norm`.
    """
    x_hat, rstd = _norm.normalize(x, norm, eps)
    dx = dnorm_weight = dnorm_bias = dweight = None
    if any(wanted[:3]):
        dz = dy @ weight
    if wanted[0]:
        dx = _norm.backward(dz, x_hat, rstd, norm_weight, norm)
    if wanted[1]:
        dnorm_weight = rows(dz * x_hat).sum(0)
    if wanted[2]:
        dnorm_bias = rows(dz).sum(0)
    if wanted[3]:
        dweight = rows(dy).T @ rows(_norm.affine(x_hat, norm_weight, norm_bias))
    return dx, dnorm_weight, dnorm_bias, dweight


def linear_gate(x: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
    """tanh(gate) · (x weightᵀ): [..., K] to [..., C]; without a gate its tanh is 1."""
    return _gated(x @ weight.T, gate)


def linear_gate_backward(
    dy: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """dx, dweight, dgate; None where not wanted. With P = dyᵀ x [C, K], so that the branch itself is not needed:

    dx = (tanh(gate) · dy) weight,  dweight = tanh(gate) · P by rows,  dgate = (1 - tanh²(gate)) · Σ P ∘ weight by rows.
    """
    dx = dweight = dgate = None
    if wanted[0]:
        dx = _gated(dy, gate) @ weight
    if wanted[1] or wanted[2]:
        p = rows(dy).T @ rows(x)
    if wanted[1]:
        dweight = _gated(p.T, gate).T
    if wanted[2]:
        dots = (p * weight).sum(1)
        dots = dots if gate.numel() == dots.numel() else dots.sum()
        dgate = (1 - gate.tanh().square()) * dots.reshape(gate.shape)
    return dx, dweight, dgate


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else gate.tanh() * x


def rows(x: Tensor) -> Tensor:
    """[..., C] to [rows, C], also where sizes are zero."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
