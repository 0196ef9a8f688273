"""The attention half of the gated block on a GPU, x + tanh(gate)·(attention(norm(x) w_qᵀ, k, v) w_outᵀ).

Forward, five launches of which two are matmuls: norm, matmul, attention, matmul, gate and residual. Backward, four
matmuls and what attention and gate need, then one pass that adds the residual's gradient to the norm's, and one that
ends all sums over rows. The queries are kept: to project them again would be two launches more.
"""

from collections.abc import Sequence

from torch import Tensor

from flamingo_kernels._gpu import linear_gate_residual, norm_linear
from flamingo_kernels._gpu.kernels import Kernels
from flamingo_kernels._gpu.rows import contiguous, gradients, matmul, rows_of


def forward(
    kernels: Kernels,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    w_q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    w_out: Tensor,
    gate: Tensor | None,
    norm: str,
    eps: float,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [B, T, C] in x's dtype, the queries and o [B, T, H, D], lse [B, H, T].

    Raises: as the three ops that this is (`norm_linear`, `masked_cross_attention`, `linear_gate_residual`).
    """
    added, *attended = branch(
        kernels, x, norm_weight, norm_bias, w_q, k, v, start, end, w_out, norm, eps, softmax_scale
    )
    return kernels.add(rows_of(x), added, *contiguous(gate)).view(x.shape), *attended


def branch(
    kernels: Kernels,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    w_q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    w_out: Tensor,
    norm: str,
    eps: float,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the gate lets through, [B·T, C] in x's dtype; the queries and o [B, T, H, D], lse [B, H, T]."""
    q = norm_linear.forward(kernels, x, norm_weight, norm_bias, w_q, norm, eps).unflatten(-1, (-1, k.shape[3]))
    o, lse = kernels.attention.forward(q, k, v, start, end, softmax_scale)
    return matmul(rows_of(o.flatten(2)), w_out.T, x.dtype), q, o, lse


def backward(
    kernels: Kernels,
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    w_q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    w_out: Tensor,
    gate: Tensor | None,
    q: Tensor,
    o: Tensor,
    lse: Tensor,
    norm: str,
    eps: float,
    softmax_scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """dx, dnorm_weight, dnorm_bias, dw_q, dk, dv, dw_out, dgate; empty where not wanted."""
    of_first, (of_k, of_v), of_last = wanted[:4], wanted[4:6], wanted[6:]
    through = any(wanted[:6])
    do, dw_out, dgate, sums = linear_gate_residual.rows_backward(
        kernels, "identity", dy, o.flatten(2), w_out, gate, (through, *of_last)
    )
    first, dk, dv = (x, norm_weight, norm_bias, w_q), None, None
    if through:
        dq, dk, dv = kernels.attention.backward(do.view(o.shape), q, k, v, start, end, o, lse, softmax_scale)
    if any(of_first):
        d_first = norm_linear.rows_backward(
            kernels, dq.flatten(2), *first, norm, eps, of_first, residual=dy, more_sums=sums
        )
    else:
        d_first = (None,) * 4
        kernels.sum_rows(sums)
    return gradients((*first, k, v, w_out, gate), (*d_first, dk if of_k else None, dv if of_v else None, dw_out, dgate))
