"""norm(x) weightᵀ in plain PyTorch, in fp32, in fp64 for fp64. The equations stand in `_linear.py` and `_norm.py`."""

from collections.abc import Sequence

from torch import Tensor

from flamingo_kernels.reference import _linear


def forward(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor, norm: str, eps: float
) -> Tensor:
    """y [..., N] in weight's dtype. Shapes as in the public op."""
    y = _linear.norm_linear(*_linear.widen(weight, x, norm_weight, norm_bias, weight), norm, eps)
    return y.to(weight.dtype).contiguous()


def backward(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    norm: str,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """dx, dnorm_weight, dnorm_bias, dweight; empty where not wanted."""
    inputs = (x, norm_weight, norm_bias, weight)
    values = _linear.norm_linear_backward(*_linear.widen(weight, dy, *inputs), norm, eps, wanted)
    return _linear.gradients(inputs, values)
