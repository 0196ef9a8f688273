"""The attention half of the gated block in plain PyTorch: x + tanh(gate)·(attention(norm(x) w_qᵀ, k, v) w_outᵀ).

Norm, attention and gate stand in `norm_linear.py`, `masked_cross_attention.py` and `linear_gate_residual.py`.
"""

from collections.abc import Sequence

from torch import Tensor

from flamingo_kernels.reference import linear_gate_residual, masked_cross_attention, norm_linear


def forward(
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
    """y [B, T, C] in x's dtype, nothing in place of the queries, o [B, T, H, D], lse [B, H, T]."""
    q = norm_linear.forward(x, norm_weight, norm_bias, w_q, norm, eps).unflatten(-1, (-1, k.shape[3]))
    o, lse = masked_cross_attention.forward(q, k, v, start, end, softmax_scale)
    return linear_gate_residual.forward(o.flatten(2), w_out, x, gate), q.new_empty(0), o, lse


def backward(
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
    """dx, dnorm_weight, dnorm_bias, dw_q, dk, dv, dw_out, dgate; empty where not wanted. q is computed again."""
    of_x, of_norm_weight, of_norm_bias, of_w_q, of_k, of_v, of_w_out, of_gate = wanted
    first = (x, norm_weight, norm_bias, w_q, norm, eps)
    q = norm_linear.forward(*first).unflatten(-1, (-1, k.shape[3]))
    do, dw_out, dgate = linear_gate_residual.backward(dy, o.flatten(2), w_out, gate, (True, of_w_out, of_gate))
    dq, dk, dv = masked_cross_attention.backward(do.view(o.shape), q, k, v, start, end, o, lse, softmax_scale)
    of_first = (of_x, of_norm_weight, of_norm_bias, of_w_q)
    dx, *others = norm_linear.backward(dq.flatten(2), *first, of_first)
    dx = dx + dy if of_x else dx
    return dx, *others, dk if of_k else k.new_empty(0), dv if of_v else v.new_empty(0), dw_out, dgate
