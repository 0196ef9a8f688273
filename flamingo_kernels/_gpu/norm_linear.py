"""norm(x) weightᵀ on a GPU: a pass that normalises, then a matmul."""

from collections.abc import Sequence

from torch import Tensor

from flamingo_kernels._gpu.kernels import Kernels, Sum
from flamingo_kernels._gpu.rows import check_dtype, contiguous, gradients, matmul, rows_of

_OP = "norm_linear"


def forward(
    kernels: Kernels,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    norm: str,
    eps: float,
) -> Tensor:
    """y [..., N] in weight's dtype. Shapes as in the public op.

    Raises:
        TypeError: fp64, which these kernels do not have.
    """
    check_dtype(kernels.BACKEND, _OP, "weight", weight)
    z, _ = kernels.normalize(rows_of(x), *contiguous(norm_weight, norm_bias), norm, eps, weight.dtype)
    return (z @ weight.T).view(*x.shape[:-1], weight.shape[0])


def backward(
    kernels: Kernels,
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    norm: str,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """dx, dnorm_weight, dnorm_bias, dweight; empty where not wanted. Raises: as forward."""
    check_dtype(kernels.BACKEND, _OP, "weight", weight)
    first = (x, norm_weight, norm_bias, weight)
    return gradients(first, rows_backward(kernels, dy, *first, norm, eps, wanted))


def rows_backward(
    kernels: Kernels,
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    norm: str,
    eps: float,
    wanted: Sequence[bool],
    *,
    residual: Tensor | None = None,
    more_sums: Sequence[Sum] = (),
) -> tuple[Tensor | None, ...]:
    """`backward` for the ops around it, None where not wanted.

    dx gets `residual` added in the same pass; `more_sums` are taken with the norm's own. z, which dweight needs, is
    computed again in the pass that gives dx: first dz = dy weight, last dweight = dyᵀ z.
    """
    of_x, of_norm_weight, of_norm_bias, of_weight = wanted
    d, flat = rows_of(dy), rows_of(x)
    parameters = contiguous(norm_weight, norm_bias)
    sums = of_norm_weight or of_norm_bias
    dx, parts = None, []
    if of_x or sums:
        dx, z, parts = kernels.norm_backward(
            matmul(d, weight, x.dtype),
            flat,
            *parameters,
            norm,
            eps,
            residual=None if residual is None else rows_of(residual),
            dx=of_x,
            z=weight.dtype if of_weight else None,
            sums=sums,
        )
    elif of_weight:
        z, _ = kernels.normalize(flat, *parameters, norm, eps, weight.dtype)

    dnorm_weight = norm_weight.new_empty(norm_weight.shape) if of_norm_weight else None
    dnorm_bias = norm_bias.new_empty(norm_bias.shape) if of_norm_bias else None
    own = [(parts[0], dnorm_weight, None)] if of_norm_weight else []
    own += [(parts[1], dnorm_bias, None)] if of_norm_bias else []
    kernels.sum_rows([*own, *more_sums])
    return dx if dx is None else dx.view(x.shape), dnorm_weight, dnorm_bias, d.T @ z if of_weight else None
