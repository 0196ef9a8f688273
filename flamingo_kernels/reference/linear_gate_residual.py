"""residual + tanh(gate)·(x weightᵀ) in plain PyTorch, in fp32, in fp64 for fp64. The equations: see `_linear.py`."""

from collections.abc import Sequence

from torch import Tensor

from flamingo_kernels.reference import _linear


def forward(x: Tensor, weight: Tensor, residual: Tensor, gate: Tensor | None) -> Tensor:
    """y [..., C] in residual's dtype. Shapes as in the public op."""
    wide_residual, *wide = _linear.widen(weight, residual, x, weight, gate)
    return (wide_residual + _linear.linear_gate(*wide)).to(residual.dtype).contiguous()


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dgate; empty where not wanted. That of the residual is dy."""
    inputs = (x, weight, gate)
    values = _linear.linear_gate_backward(*_linear.widen(weight, dy, *inputs), wanted)
    return _linear.gradients(inputs, values)
