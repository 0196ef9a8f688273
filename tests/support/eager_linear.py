"""norm_linear, linear_gate_residual and gated_mlp as eager code of torch.nn.functional has them, with autograd.

Written apart from the package's own reference, which it tests too. Matmuls are in the dtype of the weights; norms and
residuals in that of the streams, as under autocast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_linear(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor, *, norm: str, eps: float
) -> Tensor:
    return F.linear(_norm(x, norm_weight, norm_bias, norm, eps).to(weight.dtype), weight)


def linear_gate_residual(x: Tensor, weight: Tensor, residual: Tensor, gate: Tensor | None) -> Tensor:
    return _add(residual, gate, F.linear(x.to(weight.dtype), weight))


def gated_mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    w_in: Tensor,
    w_out: Tensor,
    gate: Tensor | None,
    *,
    activation: str,
    norm: str,
    eps: float,
    recompute: bool,
) -> Tensor:
    hidden = F.linear(_norm(x, norm_weight, norm_bias, norm, eps).to(w_in.dtype), w_in)
    return _add(x, gate, F.linear(_activate(hidden, activation), w_out))


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float) -> Tensor:
    for parameter in (weight, bias):
        x = x if parameter is None else x.to(torch.promote_types(x.dtype, parameter.dtype))
    weight, bias = (None if parameter is None else parameter.to(x.dtype) for parameter in (weight, bias))
    if x.dtype == torch.float64:  # written out, since torch's errs more in the gradient of the weight
        x = x - x.mean(-1, keepdim=True) if norm == "layer" else x
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 if weight is None else weight)
        return x if bias is None else x + bias
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _add(residual: Tensor, gate: Tensor | None, branch: Tensor) -> Tensor:
    return (residual + (branch if gate is None else gate.tanh() * branch)).to(residual.dtype)


def _activate(hidden: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, up = hidden.chunk(2, -1)
        return F.silu(gate) * up
    if activation == "squared_relu":
        return F.relu(hidden) ** 2
    if activation == "gelu_tanh":
        return F.gelu(hidden, approximate="tanh")
    return getattr(F, activation)(hidden)
