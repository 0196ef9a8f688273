"""residual + tanh(gate)·(x weightᵀ) on a GPU: a matmul, then a pass that gates and adds.

Backward, gate of one number: the matmul dx' = dy weight, and one pass over dx' and x that gives dx = tanh(gate) · dx',
x' = tanh(gate) · x for dweight = dyᵀ x', and dgate = (1 - tanh²(gate)) · Σ dx' · x.
Per channel, tanh(gate) scales rows of the weight: with P = dyᵀ x, dweight = tanh(gate) · P by rows and
dgate = (1 - tanh²(gate)) · Σ P ∘ weight by rows, so one pass over P and weight gives both.
"""

from collections.abc import Sequence

from torch import Tensor

from flamingo_kernels._gpu.kernels import Kernels, Sum
from flamingo_kernels._gpu.rows import check_dtype, contiguous, gradients, is_vector, matmul, rows_of

_OP = "linear_gate_residual"
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, list[Sum]]


def forward(kernels: Kernels, x: Tensor, weight: Tensor, residual: Tensor, gate: Tensor | None) -> Tensor:
    """y [..., C] in residual's dtype. Shapes as in the public op.

    Raises: TypeError for fp64, which these kernels do not have.
    """
    check_dtype(kernels.BACKEND, _OP, "weight", weight)
    branch = matmul(rows_of(x.to(weight.dtype)), weight.T, residual.dtype)
    return kernels.add(rows_of(residual), branch, *contiguous(gate)).view(residual.shape)


def backward(
    kernels: Kernels, dy: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dgate; empty where not wanted. That of the residual is dy. Raises: as forward."""
    check_dtype(kernels.BACKEND, _OP, "weight", weight)
    dx, dweight, dgate, sums = rows_backward(kernels, "identity", dy, x, weight, gate, wanted)
    kernels.sum_rows(sums)
    dx = None if dx is None else dx.to(x.dtype).view(x.shape)
    return gradients((x, weight, gate), (dx, dweight, dgate))


def rows_backward(
    kernels: Kernels,
    activation: str,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    wanted: Sequence[bool],
) -> Gradients:
    """dx [rows, K], dweight and dgate, of the branch tanh(gate)·(act(x) weightᵀ), None where not wanted.

    And the sums that dgate waits for, which the caller takes, maybe with others of its own.
    """
    of_x, of_weight, of_gate = wanted
    if not any(wanted):
        return None, None, None, []
    d, h, (gate,) = rows_of(dy.to(weight.dtype)), rows_of(x.to(weight.dtype)), contiguous(gate)
    if is_vector(gate):
        return _backward_per_channel(kernels, activation, d, h, weight, gate, wanted)
    if activation == "identity" and gate is None:  # nothing is between the matmuls
        return d @ weight if of_x else None, d.T @ h if of_weight else None, None, []
    wide = dy.dtype if activation == "identity" else d.dtype  # inside a feed-forward, twice the bytes would be much
    da = matmul(d, weight, wide) if of_x or of_gate else None
    dx, a, part = kernels.activation_backward(activation, da, h, gate, dh=of_x, a=of_weight, sums=of_gate)
    dgate = gate.new_empty(gate.shape) if of_gate else None
    return dx, d.T @ a if of_weight else None, dgate, [(part, dgate, gate)] if of_gate else []


def _backward_per_channel(
    kernels: Kernels, activation: str, d: Tensor, h: Tensor, weight: Tensor, gate: Tensor, wanted: Sequence[bool]
) -> Gradients:
    of_x, of_weight, of_gate = wanted
    dx, a = kernels.scale(d, gate) @ weight if of_x else None, h
    if activation != "identity":
        dx, a, _ = kernels.activation_backward(activation, dx, h, None, dh=of_x, a=of_weight or of_gate, sums=False)
    dweight = dgate = None
    if of_weight or of_gate:
        dweight, dgate = kernels.weight_gradients(d.T @ a, weight, gate)
    return dx, dweight if of_weight else None, dgate if of_gate else None, []
