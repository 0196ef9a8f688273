"""The feed-forward behind its norm and gate on a GPU.

    h = norm(x) w_inᵀ,  y = x + tanh(gate)·(act(h) w_outᵀ)

Forward, four launches of which two are matmuls: the pass that normalises x also writes y = x, and the second matmul
adds to that, its operand scaled by tanh(gate). Streams wider than the weights, and a gate per channel, take a fifth
launch that gates and adds. Backward, seven launches of which four are matmuls.
"""

from collections.abc import Sequence

from torch import Tensor

from flamingo_kernels._gpu import linear_gate_residual, norm_linear
from flamingo_kernels._gpu.kernels import Kernels
from flamingo_kernels._gpu.rows import check_dtype, contiguous, gradients, is_vector, matmul, rows_of

_OP = "gated_mlp"


def forward(
    kernels: Kernels,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    w_in: Tensor,
    w_out: Tensor,
    gate: Tensor | None,
    activation: str,
    norm: str,
    eps: float,
    save_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """y [..., C] in x's dtype, and h [..., F] ([..., 2F] for swiglu) in w_in's, or [0] unless save_hidden.

    Raises:
        TypeError: fp64, which these kernels do not have.
    """
    check_dtype(kernels.BACKEND, _OP, "w_in", w_in)
    flat, in_place = rows_of(x), adds_in_place(x, w_in, gate)
    z, copy = kernels.normalize(flat, *contiguous(norm_weight, norm_bias), norm, eps, w_in.dtype, copy=in_place)
    y, h = behind_norm(kernels, z, flat, copy if in_place else None, w_in, w_out, gate, activation)
    return y.view(x.shape), h.view(*x.shape[:-1], w_in.shape[0]) if save_hidden else w_in.new_empty(0)


def adds_in_place(x: Tensor, w_in: Tensor, gate: Tensor | None) -> bool:
    """Whether the second matmul can add to a copy of x."""
    return not is_vector(gate) and x.dtype == w_in.dtype


def behind_norm(
    kernels: Kernels,
    z: Tensor,
    x: Tensor,
    copy: Tensor | None,
    w_in: Tensor,
    w_out: Tensor,
    gate: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """y [rows, C], which takes the memory of a copy of x where there is one, and h, of x and its norm z [rows, C]."""
    (gate,) = contiguous(gate)
    h = z @ w_in.T
    a = kernels.activate(activation, h, None if copy is None else gate)
    if copy is None:
        return kernels.add(x, matmul(a, w_out.T, x.dtype), gate), h
    return copy.addmm_(a, w_out.T), h


def backward(
    kernels: Kernels,
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    w_in: Tensor,
    w_out: Tensor,
    gate: Tensor | None,
    activation: str,
    norm: str,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """dx, dnorm_weight, dnorm_bias, dw_in, dw_out, dgate; empty where not wanted. An empty h is computed again."""
    check_dtype(kernels.BACKEND, _OP, "w_in", w_in)
    first = (x, norm_weight, norm_bias, w_in, norm, eps)
    if not hidden.numel():
        hidden = norm_linear.forward(kernels, *first)
    through = any(wanted[:4])
    dh, dw_out, dgate, sums = linear_gate_residual.rows_backward(
        kernels, activation, dy, hidden, w_out, gate, (through, *wanted[4:])
    )
    if through:
        of_first = norm_linear.rows_backward(kernels, dh, *first, wanted[:4], residual=dy, more_sums=sums)
    else:
        of_first = (None,) * 4
        kernels.sum_rows(sums)
    return gradients((*first[:4], w_out, gate), (*of_first, dw_out, dgate))
