"""gated_cross_attention: the attention half of the gated block, residual and all.

It is norm_linear, masked_cross_attention and linear_gate_residual as one op. So the gradient of the residual joins that
of the norm in the pass that writes it, and the queries need not be kept: where a matmul is cheap beside what it would
save, backward projects them again.
"""

from torch import Tensor

from flamingo_kernels import _backends
from flamingo_kernels._checks import expect, expect_type, message
from flamingo_kernels.intervals import Intervals
from flamingo_kernels.ops._attention import check_keys, check_tensors, empty_forward, scale_of
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
from flamingo_kernels.ops.masked_cross_attention import check_rows

_OP = "gated_cross_attention"
_KEEP_QUERIES = ("triton", "cuda")  # where two launches more would cost more than the memory saves


def gated_cross_attention(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    w_q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Intervals,
    w_out: Tensor,
    gate: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-5,
    softmax_scale: float | None = None,
) -> Tensor:
    """Text attends to the media that it may see.

        y = x + tanh(gate)·(masked_cross_attention(norm(x) w_qᵀ, k, v, intervals) w_outᵀ)

    Args:
        x: [B, T, C]; any strides. Of the weights' dtype, or fp32 beside bf16 or fp16 weights.
        norm_weight, norm_bias: [C], of a dtype that x may have, or None; see `norm_linear`.
        w_q: [H·D, C], fp32, bf16, fp16 (or fp64 on the cpu and reference backends).
        k, v: [B', K, G, D] of w_q's dtype; see `masked_cross_attention`, also for intervals and softmax_scale.
        w_out: [C, H·D] of w_q's dtype.
        gate: [], [1] or [C], of a dtype that x may have; None: its tanh is 1.
        norm: "layer" | "rms", with eps added to the variance.

    Returns:
        y [B, T, C] in x's dtype, contiguous.

    Saved for backward: the tensors that came in, what attention gives [B, T, H, D] and its log-sum-exp, start and end,
    that is, besides what came in, e·B·T·H·D + 4·B·H·T + 8·B·T bytes with e bytes per element of the weights (the
    log-sum-exp: 8·B·H·T for fp64); on the triton backend the queries too, e·B·T·H·D.

    Under autocast, w_q, k, v and w_out are cast to the autocast dtype; x, gate and the norm's parameters stay as they
    are. Deterministic, forward and backward.

    Raises:
        TypeError: an argument that is no tensor, or of an unsupported dtype.
        ValueError: shapes, devices, head or row counts that do not fit, or intervals outside 0..K on the CPU.
    """
    arguments = checked(
        x, norm_weight, norm_bias, w_q, k, v, intervals, w_out, gate, norm=norm, eps=eps, softmax_scale=softmax_scale
    )
    y, *_ = _forward(*arguments, _backends.select(x.device.type, _OP, k.shape[3]))
    return y


def checked(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    w_q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Intervals,
    w_out: Tensor,
    gate: Tensor | None,
    *,
    norm: str,
    eps: float,
    softmax_scale: float | None = None,
) -> tuple[Tensor | str | float | None, ...]:
    """What the registered op takes, but for the backend. Raises what `gated_cross_attention` raises."""
    check_floating(_OP, "x", x)
    expect(x.ndim == 3, _OP, "x", "of shape [B, T, C]", x.shape)
    compute = check_weight(_OP, "w_q", w_q, x, x.shape[-1], "x")
    check_stream(_OP, "x", x, compute)
    check_norm(_OP, x, norm_weight, norm_bias, norm, eps, compute)
    check_tensors(_OP, k=k, v=v)
    same = k.dtype == w_q.dtype or not (is_left_alone(w_q) or is_left_alone(k))
    expect_type(same, _OP, "k", "of w_q's dtype", k.dtype)
    expect(k.device == x.device, _OP, "k", "on x's device", k.device)
    dim = k.shape[3]
    if dim == 0 or w_q.shape[0] % dim:
        raise ValueError(message(_OP, "k", f"of a head dim that divides w_q's rows, {w_q.shape[0]}", k.shape))
    check_keys(_OP, w_q.shape[0] // dim, dim, k=k, v=v)
    start, end = check_rows(_OP, x, k, intervals)
    check_floating(_OP, "w_out", w_out)
    same = w_out.dtype == w_q.dtype or not (is_left_alone(w_q) or is_left_alone(w_out))
    expect_type(same, _OP, "w_out", "of w_q's dtype", w_out.dtype)
    fits = w_out.ndim == 2 and w_out.shape[0] == x.shape[-1] and w_out.shape[1] == w_q.shape[0]
    expect(fits, _OP, "w_out", "of shape [C, H·D] where w_q is [H·D, C]", w_out.shape)
    expect(w_out.device == x.device, _OP, "w_out", "on x's device", w_out.device)
    check_gate(_OP, x, gate, x.shape[-1], compute)
    tensors = (x, norm_weight, norm_bias, w_q, k, v, start, end, w_out, gate)
    return *tensors, norm, float(eps), scale_of(_OP, k, softmax_scale)


def _forward_kernel(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = _backends.kernels(backend, _OP)
    return kernels.forward(x, norm_weight, norm_bias, w_q, k, v, start, end, w_out, gate, norm, eps, softmax_scale)


def forward_fake(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, w_q: Tensor, k: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, backend = others
    o, lse = empty_forward(w_q.new_empty((*x.shape[:2], w_q.shape[0] // k.shape[3], k.shape[3])))
    return x.new_empty(x.shape), o.new_empty(o.shape if backend in _KEEP_QUERIES else 0), o, lse


def _backward_kernel(
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
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    saved = (x, norm_weight, norm_bias, w_q, k, v, start, end, w_out, gate, q, o, lse)
    wanted = of_given((x, norm_weight, norm_bias, w_q, k, v, w_out, gate), wanted)
    return tuple(_backends.kernels(backend, _OP).backward(dy, *saved, norm, eps, softmax_scale, wanted))


def _backward_fake(
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
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    return gradients_fake((x, norm_weight, norm_bias, w_q, k, v, w_out, gate), wanted)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.norm, ctx.eps, ctx.softmax_scale, ctx.backend = inputs
    _, *attended = output
    ctx.set_materialize_grads(False)  # for those of what nobody has but this op
    ctx.save_for_backward(*tensors, *attended)


def _backward_formula(ctx, dy: Tensor | None, *_: None):
    if dy is None:
        return (None,) * 14
    needed = ctx.needs_input_grad
    wanted = (*needed[:6], *needed[8:10])  # not those of the intervals
    options = (ctx.norm, ctx.eps, ctx.softmax_scale)
    gradients = only_wanted(backward_op(dy, *ctx.saved_tensors, *options, list(wanted), ctx.backend), wanted)
    return *gradients[:6], None, None, *gradients[6:], None, None, None, None


_forward = register(
    "gated_cross_attention(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor w_q, Tensor k, Tensor v, "
    "Tensor start, Tensor end, Tensor w_out, Tensor? gate, str norm, float eps, float softmax_scale, str backend) "
    "-> (Tensor y, Tensor q, Tensor o, Tensor lse)",
    _forward_kernel,
    forward_fake,
)
backward_op = register(
    "gated_cross_attention_backward(Tensor dy, Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor w_q, Tensor k, "
    "Tensor v, Tensor start, Tensor end, Tensor w_out, Tensor? gate, Tensor q, Tensor o, Tensor lse, str norm, "
    "float eps, float softmax_scale, bool[] wanted, str backend) -> (Tensor dx, Tensor dnorm_weight, "
    "Tensor dnorm_bias, Tensor dw_q, Tensor dk, Tensor dv, Tensor dw_out, Tensor dgate)",
    _backward_kernel,
    _backward_fake,
)
register_autograd(_forward, _backward_formula, _setup_context)
register_autocast(_forward, ("w_q", "k", "v", "w_out"))
forbid_double_backward(backward_op)
