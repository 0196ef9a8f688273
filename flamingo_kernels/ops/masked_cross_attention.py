"""masked_cross_attention: each text token attends to one run of the key axis."""

from torch import Tensor

from flamingo_kernels import _backends
from flamingo_kernels._checks import got, message
from flamingo_kernels.intervals import Intervals
from flamingo_kernels.ops._attention import check_keys, check_positions, check_tensors, empty_forward, scale_of
from flamingo_kernels.ops._register import forbid_double_backward, register, register_autocast, register_autograd

_OP = "masked_cross_attention"


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
    check_tensors(_OP, q=q, k=k, v=v)
    check_keys(_OP, *q.shape[2:], k=k, v=v)
    start, end = check_rows(_OP, q, k, intervals)
    softmax_scale = scale_of(_OP, q, softmax_scale)
    backend = _backends.select(q.device.type, _OP, q.shape[3])
    o, lse = _forward(q, k, v, start, end, softmax_scale, backend)
    return (o, lse.detach()) if return_lse else o


def check_rows(op: str, x: Tensor, k: Tensor, intervals: Intervals) -> tuple[Tensor, Tensor]:
    """Rows of k and intervals that fit those of x [B, T, ...], the queries or what they come from.

    Returns int32 start and end.
    """
    rows, kv_rows = x.shape[0], k.shape[0]
    if not (rows == kv_rows == 0 or (kv_rows > 0 and rows % kv_rows == 0)):
        raise ValueError(message(op, "k", "of a number of rows that divides q's", k.shape))
    pair = isinstance(intervals, tuple | list)
    if not pair or len(intervals) != 2:
        came = f"{len(intervals)} of them" if pair else got(intervals)
        raise TypeError(message(op, "intervals", "two tensors (start, end)", came))
    start = check_positions(op, x, "intervals.start", intervals[0], x.shape[:2], "[B, T]")
    end = check_positions(op, x, "intervals.end", intervals[1], x.shape[:2], "[B, T]")
    return start, end


def _forward_kernel(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, softmax_scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    return _backends.kernels(backend, _OP).forward(q, k, v, start, end, softmax_scale)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, softmax_scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    return empty_forward(q)


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
    ctx.set_materialize_grads(False)  # for lse's, which has none, that would be a tensor of zeros
    ctx.save_for_backward(*tensors, *output)


def _backward_formula(ctx, do: Tensor | None, dlse: None):
    if do is None:
        return (None,) * 7
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
