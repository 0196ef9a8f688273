"""residual + tanh(gate)·(x weightᵀ) in Triton and cuBLAS: a matmul, then a pass that gates and adds.

Backward, gate of one number: the matmul dx' = dy weight, and one pass over dx' and x that gives dx = tanh(gate) · dx',
x' = tanh(gate) · x for dweight = dyᵀ x', and dgate = (1 - tanh²(gate)) · Σ dx' · x. Per channel: `_gate.py`.
"""

from collections.abc import Sequence

from torch import Tensor

from flamingo_kernels.triton import _activation, _gate
from flamingo_kernels.triton._rows import check_dtype, gradients, matmul, rows_of, sum_rows

_OP = "linear_gate_residual"
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, list[tuple[Tensor, Tensor, Tensor | None]]]


def forward(x: Tensor, weight: Tensor, residual: Tensor, gate: Tensor | None) -> Tensor:
    """y [..., C] in residual's dtype. Shapes as in the public op.

    Raises: TypeError for fp64, which these kernels do not have.
    """
    check_dtype(_OP, "weight", weight)
    branch = matmul(rows_of(x.to(weight.dtype)), weight.T, residual.dtype)
    return _gate.add(rows_of(residual), branch, _gate.contiguous(gate)).view(residual.shape)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dgate; empty where not wanted. That of the residual is dy. Raises: as forward."""
    check_dtype(_OP, "weight", weight)
    dx, dweight, dgate, sums = rows_backward("identity", dy, x, weight, gate, wanted)
    sum_rows(sums)
    dx = None if dx is None else dx.to(x.dtype).view(x.shape)
    return gradients((x, weight, gate), (dx, dweight, dgate))


def rows_backward(
    activation: str, dy: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, wanted: Sequence[bool]
) -> Gradients:
    """dx [rows, K], dweight and dgate, of the branch tanh(gate)·(act(x) weightᵀ), None where not wanted.

    And the sums that dgate waits for, which the caller takes, maybe with others of its own.
    """
    of_x, of_weight, of_gate = wanted
    if not any(wanted):
        return None, None, None, []
    d, h, gate = rows_of(dy.to(weight.dtype)), rows_of(x.to(weight.dtype)), _gate.contiguous(gate)
    if _gate.is_vector(gate):
        return _backward_per_channel(activation, d, h, weight, gate, wanted)
    if activation == "identity" and gate is None:  # nothing is between the matmuls
        return d @ weight if of_x else None, d.T @ h if of_weight else None, None, []
    wide = dy.dtype if activation == "identity" else d.dtype  # inside a feed-forward, twice the bytes would be much
    da = matmul(d, weight, wide) if of_x or of_gate else None
    dx, a, part = _activation.backward(activation, da, h, gate, dh=of_x, a=of_weight, sums=of_gate)
    dgate = gate.new_empty(gate.shape) if of_gate else None
    return dx, d.T @ a if of_weight else None, dgate, [(part, dgate, gate)] if of_gate else []


def _backward_per_channel(
    activation: str, d: Tensor, h: Tensor, weight: Tensor, gate: Tensor, wanted: Sequence[bool]
) -> Gradients:
    of_x, of_weight, of_gate = wanted
    dx, a = _gate.scale(d, gate, d.dtype) @ weight if of_x else None, h
    if activation != "identity":
        dx, a, _ = _activation.backward(activation, dx, h, None, dh=of_x, a=of_weight or of_gate, sums=False)
    dweight = dgate = None
    if of_weight or of_gate:
        dweight, dgate = _gate.weight_gradients(d.T @ a, weight, gate)
    return dx, dweight if of_weight else None, dgate if of_gate else None, []
