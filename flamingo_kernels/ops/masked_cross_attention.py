"""masked_cross_attention: each text token attends to one run of the key axis."""

import torch
from torch import Tensor

from flamingo_kernels import _backends
from flamingo_kernels._checks import expect, expect_type, got
from flamingo_kernels.intervals import Intervals
from flamingo_kernels.ops._register import forbid_double_backward, register, register_autocast, register_autograd

_OP = "masked_cross_attention"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def masked_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Intervals,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of text on media, where token t of row b sees the keys start[b, t] <= j < end[b, t].

        o[t] = Σ_j softmax_j(softmax_scale · ⟨q[t], k[j]⟩) v[j]     over the keys that t sees (arXiv 2204.14198, 3.1.2)

    A token that sees nothing gives exactly 0 and gets no gradient. Any intervals are right; monotone ones are fast.

    Args:
        q: [B, T, H, D], fp32, bf16, fp16 (or fp64 on the cpu and reference backends); any strides.
        k, v: [B', K, G, D] of q's dtype. B % B' == 0: row b reads the keys of row b // (B // B'), so beams share
            keys. H % G == 0: query head h reads key head h // (H // G).
        intervals: `media_intervals(...)`, or any two int32 (int64 is cast) [B, T] tensors (start, end);
            start >= end sees nothing. Outside 0..K: ValueError on the CPU, clamped on a GPU.
        softmax_scale: default D ** -0.5.
        return_lse: also return the log-sum-exp.

    Returns:
        o [B, T, H, D] in q's dtype, contiguous; with return_lse also lse [B, H, T] in fp32 (fp64 for fp64): the natural
        log of the sum of exp over what is visible, scale included, -inf where that is nothing; not differentiable.

    Saved for backward: q, k, v, o, lse, start, end, that is
        e·(2·B·T·H·D + 2·B'·K·G·D) + 4·B·H·T + 8·B·T bytes with e bytes per element (lse: 8·B·H·T for fp64).

    Under autocast, q, k and v are cast to the autocast dtype. Deterministic, forward and backward.

    Raises:
        TypeError: an argument that is no tensor, or of an unsupported dtype.
        ValueError: shapes, devices, head or row counts that do not fit, or intervals outside 0..K on the CPU.
    """
    start, end = _checked(q, k, v, intervals)
    if softmax_scale is None:
        softmax_scale = q.shape[3] ** -0.5 if q.shape[3] else 1.0
    number = isinstance(softmax_scale, int | float | torch.SymInt | torch.SymFloat)
    expect_type(number, _OP, "softmax_scale", "a number", got(softmax_scale))
    o, lse = _forward(q, k, v, start, end, float(softmax_scale), _backends.select(q.device.type, _OP))
    return (o, lse.detach()) if return_lse else o


def _checked(q: Tensor, k: Tensor, v: Tensor, intervals: Intervals) -> tuple[Tensor, Tensor]:
    """Check everything that shapes, dtypes and devices tell; returns int32 start and end."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect_type(isinstance(x, Tensor), _OP, name, "a tensor", got(x))
        expect(x.ndim == 4, _OP, name, "of rank 4, [rows, tokens, heads, head dim]", x.shape)
        expect_type(x.dtype in _DTYPES, _OP, name, "of dtype float32, bfloat16, float16 or float64", x.dtype)
    for name, x in (("k", k), ("v", v)):
        # autocast makes the dtypes equal, so that they need not be so before it; but it leaves fp64 as it is
        castable = torch.float64 not in (x.dtype, q.dtype)
        same = x.dtype == q.dtype or (castable and torch.is_autocast_enabled(q.device.type))
        expect_type(same, _OP, name, "of q's dtype", x.dtype)
        expect(x.device == q.device, _OP, name, "on q's device", x.device)
    expect(v.shape == k.shape, _OP, "v", "of k's shape", v.shape)
    rows, tokens, heads, dim = q.shape
    kv_rows, _, kv_heads, kv_dim = k.shape
    expect(kv_dim == dim, _OP, "k", "of q's head dim", k.shape)
    expect(
        heads == kv_heads == 0 or (kv_heads > 0 and heads % kv_heads == 0),
        _OP,
        "k",
        "of a number of heads that divides q's",
        k.shape,
    )
    expect(
        rows == kv_rows == 0 or (kv_rows > 0 and rows % kv_rows == 0),
        _OP,
        "k",
        "of a number of rows that divides q's",
        k.shape,
    )
    pair = isinstance(intervals, tuple | list)
    came = f"{len(intervals)} of them" if pair else got(intervals)
    expect_type(pair and len(intervals) == 2, _OP, "intervals", "two tensors (start, end)", came)
    for name, x in (("intervals.start", intervals[0]), ("intervals.end", intervals[1])):
        expect_type(isinstance(x, Tensor), _OP, name, "a tensor", got(x))
        expect_type(x.dtype in (torch.int32, torch.int64), _OP, name, "of dtype int32 or int64", x.dtype)
        expect(x.ndim == 2 and x.shape[0] == rows and x.shape[1] == tokens, _OP, name, "of shape [B, T]", x.shape)
        expect(x.device == q.device, _OP, name, "on q's device", x.device)
    start, end = intervals
    return _int32(start), _int32(end)


def _int32(position: Tensor) -> Tensor:
    """Saturated, so that an int64 outside of the keys stays outside instead of wrapping around into them."""
    return position if position.dtype == torch.int32 else position.clamp(-1, 2**31 - 1).int()


def _forward_kernel(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, softmax_scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    return _backends.kernels(backend, _OP).forward(q, k, v, start, end, softmax_scale)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, softmax_scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    rows, tokens, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((rows, heads, tokens), dtype=lse_dtype)


def _backward_kernel(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    o: Tensor,
    lse: Tensor,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backends.kernels(backend, _OP).backward(do, q, k, v, start, end, o, lse, softmax_scale)


def _backward_fake(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.softmax_scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward_formula(ctx, do: Tensor, dlse: Tensor):
    dq, dk, dv = _backward(do, *ctx.saved_tensors, ctx.softmax_scale, ctx.backend)
    return dq, dk, dv, None, None, None, None


_forward = register(
    "masked_cross_attention(Tensor q, Tensor k, Tensor v, Tensor start, Tensor end, float softmax_scale, str backend) "
    "-> (Tensor o, Tensor lse)",
    _forward_kernel,
    _forward_fake,
)
_backward = register(
    "masked_cross_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor start, Tensor end, Tensor o, "
    "Tensor lse, float softmax_scale, str backend) -> (Tensor dq, Tensor dk, Tensor dv)",
    _backward_kernel,
    _backward_fake,
)
register_autograd(_forward, _backward_formula, _setup_context)
register_autocast(_forward, ("q", "k", "v"))
forbid_double_backward(_backward)
