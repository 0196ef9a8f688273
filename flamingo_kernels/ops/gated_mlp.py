"""gated_mlp: a feed-forward with its norm, behind a tanh gate, added to its own input."""

import torch
from torch import Tensor

from flamingo_kernels import _backends
from flamingo_kernels._checks import expect, expect_type, got, message
from flamingo_kernels.ops._linear_args import (
    check_floating,
    check_gate,
    check_norm,
    check_stream,
    check_weight,
    gradients_fake,
    of_given,
    only_wanted,
)
from flamingo_kernels.ops._register import (
    forbid_double_backward,
    is_left_alone,
    register,
    register_autocast,
    register_autograd,
)

ACTIVATIONS = ("squared_relu", "gelu", "gelu_tanh", "relu", "silu", "swiglu")
_OP = "gated_mlp"


def gated_mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    w_in: Tensor,
    w_out: Tensor,
    gate: Tensor | None = None,
    *,
    activation: str = "squared_relu",
    norm: str = "layer",
    eps: float = 1e-5,
    recompute: bool = False,
) -> Tensor:
    """The feed-forward of a Transformer layer, residual and all.

        y = x + tanh(gate)·(act(hidden) w_outᵀ),   hidden = norm(x) w_inᵀ

    Args:
        x: [..., C]; any strides. Of the weights' dtype, or fp32 beside bf16 or fp16 weights.
        norm_weight, norm_bias: [C], of a dtype that x may have, or None; see `norm_linear`.
        w_in: [F, C], for swiglu [2F, C] with the gate half first; fp32, bf16, fp16 (or fp64 on the cpu and reference
            backends).
        w_out: [C, F] of w_in's dtype.
        gate: [], [1] or [C], of a dtype that x may have; None: its tanh is 1.
        activation: "squared_relu": relu(h)², the paper's (Primer, arXiv 2109.08668) | "gelu": h Φ(h) |
            "gelu_tanh": h (1 + tanh(√(2/π) (h + 0.044715 h³))) / 2 | "relu" | "silu": h σ(h) |
            "swiglu": silu(first half) · second half (arXiv 2002.05202).
        norm: "layer" | "rms".
        eps: added to the variance, or to the mean square.
        recompute: backward computes `hidden` again, for one more matmul, instead of having it saved.

    Returns:
        y [..., C] in x's dtype, contiguous.

    Saved for backward: x, norm_weight, norm_bias, w_in, w_out, gate and, unless `recompute`, hidden. For n rows, F' the
    rows of w_in and a gate of g numbers that is
        e_x·n·C + 2·e_n·C + e·(F'·C + C·F) + e_g·g, and e·n·F' for hidden,
    with e bytes per element of the weights, of x, of the norm's parameters and of gate. Hidden is not kept where no
    input needs a gradient.

    Under autocast, w_in and w_out are cast to the autocast dtype; x, gate and the norm's parameters stay as they are.
    Statistics, sums and the activation are in fp32 (fp64 for fp64). Deterministic, forward and backward.

    Raises:
        TypeError: an argument that is no tensor, or of an unsupported dtype.
        ValueError: shapes or devices that do not fit, an unknown activation or norm, a norm_bias that has no place, eps
            below 0.
    """
    tensors = (x, norm_weight, norm_bias, w_in, w_out, gate)
    check_arguments(*tensors, activation, norm, eps)
    if not isinstance(recompute, bool):
        raise TypeError(message(_OP, "recompute", "a bool", got(recompute)))

    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    save_hidden = needs_gradient and not recompute
    y, _ = forward_op(*tensors, activation, norm, float(eps), save_hidden, _backends.select(x.device.type, _OP))
    return y


def check_arguments(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    w_in: Tensor,
    w_out: Tensor,
    gate: Tensor | None,
    activation: str,
    norm: str,
    eps: float,
) -> None:
    """Raise what `gated_mlp` raises."""
    check_floating(_OP, "x", x)
    expect(x.ndim >= 1, _OP, "x", "of shape [..., C]", x.shape)
    if activation not in ACTIVATIONS:
        raise ValueError(message(_OP, "activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation)))
    compute = check_weight(_OP, "w_in", w_in, x, x.shape[-1], "x")
    check_stream(_OP, "x", x, compute)
    check_floating(_OP, "w_out", w_out)
    same = w_out.dtype == w_in.dtype or not (is_left_alone(w_in) or is_left_alone(w_out))
    expect_type(same, _OP, "w_out", "of w_in's dtype", w_out.dtype)
    halves = 2 if activation == "swiglu" else 1
    fits = w_out.ndim == 2 and w_out.shape[0] == x.shape[-1] and halves * w_out.shape[1] == w_in.shape[0]
    expected = "of shape [C, F] where w_in is [2F, C]" if halves == 2 else "of shape [C, F] where w_in is [F, C]"
    expect(fits, _OP, "w_out", expected, w_out.shape)
    expect(w_out.device == x.device, _OP, "w_out", "on x's device", w_out.device)
    check_norm(_OP, x, norm_weight, norm_bias, norm, eps, compute)
    check_gate(_OP, x, gate, x.shape[-1], compute)


def _forward_kernel(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernels = _backends.kernels(backend, _OP)
    return kernels.forward(x, norm_weight, norm_bias, w_in, w_out, gate, activation, norm, eps, save_hidden)


def forward_fake(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    hidden = (*x.shape[:-1], w_in.shape[0]) if save_hidden else (0,)
    return x.new_empty(x.shape), w_in.new_empty(hidden)


def _backward_kernel(
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
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    kernels = _backends.kernels(backend, _OP)
    inputs = (x, norm_weight, norm_bias, w_in, w_out, gate)
    return kernels.backward(dy, x, hidden, *inputs[1:], activation, norm, eps, of_given(inputs, wanted))


def _backward_fake(
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
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    return gradients_fake((x, norm_weight, norm_bias, w_in, w_out, gate), wanted)


def _setup_context(ctx, inputs, output) -> None:
    x, *others, ctx.activation, ctx.norm, ctx.eps, _, ctx.backend = inputs
    _, hidden = output
    ctx.set_materialize_grads(False)  # for hidden's, which nobody has, that would be a large tensor of zeros
    ctx.save_for_backward(x, hidden, *others)


def _backward_formula(ctx, dy: Tensor | None, dhidden: None):
    if dy is None:
        return (None,) * 11
    wanted = ctx.needs_input_grad[:6]
    saved, options = ctx.saved_tensors, (ctx.activation, ctx.norm, ctx.eps)
    gradients = backward_op(dy, *saved, *options, list(wanted), ctx.backend)
    return *only_wanted(gradients, wanted), None, None, None, None, None


forward_op = register(
    "gated_mlp(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor w_in, Tensor w_out, Tensor? gate, "
    "str activation, str norm, float eps, bool save_hidden, str backend) -> (Tensor y, Tensor hidden)",
    _forward_kernel,
    forward_fake,
)
backward_op = register(
    "gated_mlp_backward(Tensor dy, Tensor x, Tensor hidden, Tensor? norm_weight, Tensor? norm_bias, Tensor w_in, "
    "Tensor w_out, Tensor? gate, str activation, str norm, float eps, bool[] wanted, str backend) -> (Tensor dx, "
    "Tensor dnorm_weight, Tensor dnorm_bias, Tensor dw_in, Tensor dw_out, Tensor dgate)",
    _backward_kernel,
    _backward_fake,
)
register_autograd(forward_op, _backward_formula, _setup_context)
register_autocast(forward_op, ("w_in", "w_out"))
forbid_double_backward(backward_op)
