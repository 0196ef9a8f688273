"""What the attention ops check alike: tensors of heads, positions on a key axis, the scale of the scores."""

import torch
from torch import Tensor

from flamingo_kernels._checks import got, message
from flamingo_kernels.ops._register import is_left_alone

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(op: str, **tensors: Tensor) -> None:
    """Every tensor is [rows, tokens, heads, head dim], and of the dtype and on the device of the first one, q."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(message(op, name, "a tensor", got(x)))
        if x.ndim != 4:
            raise ValueError(message(op, name, "of rank 4, [rows, tokens, heads, head dim]", x.shape))
        if x.dtype not in _DTYPES:
            raise TypeError(message(op, name, "of dtype float32, bfloat16, float16 or float64", x.dtype))
    q, *_ = tensors.values()
    for name, x in tensors.items():
        # autocast makes the dtypes equal, so that they need not be so before it
        if x.dtype != q.dtype and (is_left_alone(x) or is_left_alone(q)):
            raise TypeError(message(op, name, "of q's dtype", x.dtype))
        if x.device != q.device:
            raise ValueError(message(op, name, "on q's device", x.device))


def check_keys(op: str, heads: int, dim: int, **keys_and_values: Tensor) -> None:
    """Values are of their keys' shape, which fits the heads of q and their dim."""
    (k_name, k), (v_name, v) = keys_and_values.items()
    shape = k.shape
    if v.shape != shape:
        raise ValueError(message(op, v_name, f"of {k_name}'s shape", v.shape))
    _, _, kv_heads, kv_dim = shape
    if kv_dim != dim:
        raise ValueError(message(op, k_name, "of q's head dim", shape))
    if not (heads == kv_heads == 0 or (kv_heads > 0 and heads % kv_heads == 0)):
        raise ValueError(message(op, k_name, "of a number of heads that divides q's", shape))


def check_positions(op: str, q: Tensor, name: str, x: Tensor, shape: tuple[int, ...], letters: str) -> Tensor:
    """Positions on the key axis in int32, saturated: an int64 outside of the keys must not wrap around into them."""
    if not isinstance(x, Tensor):
        raise TypeError(message(op, name, "a tensor", got(x)))
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(message(op, name, "of dtype int32 or int64", x.dtype))
    if x.ndim != len(shape) or x.shape != shape:
        raise ValueError(message(op, name, f"of shape {letters}", x.shape))
    if x.device != q.device:
        raise ValueError(message(op, name, "on q's device", x.device))
    return x if x.dtype == torch.int32 else x.clamp(-1, 2**31 - 1).int()


def scale_of(op: str, x: Tensor, softmax_scale: float | None) -> float:
    """The scale of the scores, D ** -0.5 unless given. x: queries or keys."""
    if softmax_scale is None:
        softmax_scale = x.shape[3] ** -0.5 if x.shape[3] else 1.0
    if not isinstance(softmax_scale, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(message(op, "softmax_scale", "a number", got(softmax_scale)))
    return float(softmax_scale)


def empty_forward(q: Tensor) -> tuple[Tensor, Tensor]:
    """o and lse, unwritten: what a fake gives."""
    rows, tokens, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((rows, heads, tokens), dtype=lse_dtype)
