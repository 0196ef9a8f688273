"""The feed-forward behind its norm and gate in plain PyTorch, in fp32, in fp64 for fp64.

    h = norm(x) w_inᵀ,  y = x + tanh(gate)·(act(h) w_outᵀ)

The norm, the activations and the two linear maps stand in `_norm.py`, `_activation.py` and `_linear.py`.
"""

from collections.abc import Sequence

from torch import Tensor

from flamingo_kernels.reference import _activation, _linear


def forward(
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
    """y [..., C] in x's dtype, and h [..., F] ([..., 2F] for swiglu) in w_in's, or [0] unless save_hidden."""
    wide_x, *normed = _linear.widen(w_in, x, norm_weight, norm_bias)
    wide_in, wide_out, gate = _linear.widen(w_in, w_in, w_out, gate)
    hidden = _linear.norm_linear(wide_x, *normed, wide_in, norm, eps)
    y = wide_x + _linear.linear_gate(_activation.activate(activation, hidden), wide_out, gate)
    saved = hidden.to(w_in.dtype).contiguous() if save_hidden else w_in.new_empty(0)
    return y.to(x.dtype).contiguous(), saved


def backward(
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
    """dx, dnorm_weight, dnorm_bias, dw_in, dw_out, dgate; empty where not wanted. An empty h is computed again.

    The second linear gives da, of a = act(h); then dh = da · act'(h), which the first takes as its dy. dx gets dy too.
    """
    inputs = (x, norm_weight, norm_bias, w_in, w_out, gate)
    dy, *normed, wide_out, gate = _linear.widen(w_in, dy, *inputs)
    (hidden,) = _linear.widen(w_in, hidden) if hidden.numel() else (_linear.norm_linear(*normed, norm, eps),)
    through = any(wanted[:4])
    a = _activation.activate(activation, hidden)
    da, dw_out, dgate = _linear.linear_gate_backward(dy, a, wide_out, gate, (through, *wanted[4:]))
    first = (None,) * 4
    if through:
        dh = _activation.backward(activation, hidden, da)
        first = _linear.norm_linear_backward(dh, *normed, norm, eps, wanted[:4])
    dx = dy + first[0] if wanted[0] else None
    return _linear.gradients(inputs, (dx, *first[1:], dw_out, dgate))
