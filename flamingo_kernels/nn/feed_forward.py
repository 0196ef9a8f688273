"""The feed-forward that the gated block and the resampler share, residual and all; no biases."""

import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_kernels.nn._linears import add, is_plain, norm_arguments, project
from flamingo_kernels.ops.gated_mlp import gated_mlp


def _squared_relu(hidden: Tensor) -> Tensor:
    """relu(x)², the paper's (Primer, arXiv 2109.08668)."""
    return F.relu(hidden).square()


def _gelu_tanh(hidden: Tensor) -> Tensor:
    return F.gelu(hidden, approximate="tanh")


def _swiglu(hidden: Tensor) -> Tensor:
    """silu(gate) · up, the gate half first (arXiv 2002.05202)."""
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS = {
    "squared_relu": _squared_relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "swiglu": _swiglu,
}


def feed_forward_linears(dim: int, ff_dim: int, activation: str) -> tuple[nn.Linear, nn.Linear]:
    """w_in [F, C] ([2F, C] for swiglu, gate half first) and w_out [C, F]."""
    rows = 2 * ff_dim if activation == "swiglu" else ff_dim
    return nn.Linear(dim, rows, bias=False), nn.Linear(ff_dim, dim, bias=False)


def feed_forward(
    x: Tensor, norm: nn.Module, w_in: nn.Module, w_out: nn.Module, gate: Tensor | None, activation: str
) -> Tensor:
    """x + tanh(gate)·w_out(act(w_in(norm(x)))), of x's shape [..., C]; without a gate its tanh is 1."""
    arguments = mlp_arguments(norm, w_in, w_out, gate, activation)
    if arguments is None:
        return add(x, gate, w_out, ACTIVATIONS[activation](project(x, norm, w_in)))
    return gated_mlp(x, **arguments)


def mlp_arguments(
    norm: nn.Module, w_in: nn.Module, w_out: nn.Module, gate: Tensor | None, activation: str
) -> dict[str, object] | None:
    """What `gated_mlp` takes behind x; None where a module has to be called."""
    normed = norm_arguments(norm)
    if normed is None or not (is_plain(w_in) and is_plain(w_out)):
        return None
    return {"w_in": w_in.weight, "w_out": w_out.weight, "gate": gate, "activation": activation, **normed}
