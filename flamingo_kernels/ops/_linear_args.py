"""What the linear ops check alike: weights, streams, norms and gates; their gradients.

The matmuls run in the dtype of the weights, or in autocast's. A stream (x, a residual, a gate, the parameters of a
norm) may be float32 beside narrower weights, as autocast leaves it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flamingo_kernels._checks import expect, got, message
from flamingo_kernels.ops._register import is_left_alone

NORMS = ("layer", "rms")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STREAMS = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16 or float32",
    torch.float16: "float16 or float32",
    torch.float64: "float64",
}


def check_floating(op: str, name: str, x: Tensor) -> None:
    """A tensor of a dtype that the ops compute in."""
    if not isinstance(x, Tensor):
        raise TypeError(message(op, name, "a tensor", got(x)))
    if x.dtype not in _DTYPES:
        raise TypeError(message(op, name, "of dtype float32, bfloat16, float16 or float64", x.dtype))


def check_weight(op: str, name: str, weight: Tensor, x: Tensor, columns: int, of: str) -> torch.dtype:
    """[out, columns] on x's device; returns the dtype that the matmul runs in. `of`: x's name."""
    check_floating(op, name, weight)
    if weight.ndim != 2:
        raise ValueError(message(op, name, "of rank 2, [out, in]", weight.shape))
    if weight.shape[1] != columns:
        raise ValueError(message(op, name, f"of {of}'s width", weight.shape))
    if weight.device != x.device:
        raise ValueError(message(op, name, f"on {of}'s device", weight.device))
    return weight.dtype if is_left_alone(weight) else torch.get_autocast_dtype(weight.device.type)


def check_stream(op: str, name: str, x: Tensor, compute: torch.dtype) -> None:
    """Of the weights' dtype, or float32 beside narrower weights."""
    narrow = compute in (torch.bfloat16, torch.float16)
    if not isinstance(x, Tensor) or not (x.dtype == compute or (narrow and x.dtype == torch.float32)):
        check_floating(op, name, x)
        raise TypeError(message(op, name, f"of dtype {_STREAMS[compute]}, beside weights of the first", x.dtype))


def check_norm(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float, compute: torch.dtype
) -> None:
    """The norm over the last dimension of x."""
    if norm not in NORMS:
        raise ValueError(message(op, "norm", f"one of {', '.join(NORMS)}", repr(norm)))
    for name, parameter in (("norm_weight", weight), ("norm_bias", bias)):
        if parameter is not None:
            check_stream(op, name, parameter, compute)
            if parameter.ndim != 1 or parameter.shape[0] != x.shape[-1]:
                raise ValueError(message(op, name, "of shape [C], C the width of x", parameter.shape))
            if parameter.device != x.device:
                raise ValueError(message(op, name, "on x's device", parameter.device))
    if bias is not None:
        expect(norm == "layer", op, "norm_bias", "None with norm='rms'", "a tensor")
        expect(weight is not None, op, "norm_bias", "None without norm_weight", "a tensor")
    check_eps(op, eps)


def check_eps(op: str, eps: float) -> None:
    """Of a norm, added to the variance."""
    if not isinstance(eps, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(message(op, "eps", "a number", got(eps)))
    expect(eps >= 0, op, "eps", "at least 0", eps)


def check_gate(op: str, x: Tensor, gate: Tensor | None, channels: int, compute: torch.dtype) -> None:
    """One number or one for each channel."""
    if gate is None:
        return
    check_stream(op, "gate", gate, compute)
    fits = gate.ndim == 0 or (gate.ndim == 1 and (gate.shape[0] == 1 or gate.shape[0] == channels))
    expect(fits, op, "gate", "of shape [], [1] or [C]", gate.shape)
    expect(gate.device == x.device, op, "gate", "on x's device", gate.device)


def of_given(inputs: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[bool]:
    """Which gradients a backward computes: those that are wanted of what is there."""
    return [flag and x is not None for x, flag in zip(inputs, wanted, strict=True)]


def gradients_fake(inputs: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """The shapes that a backward returns: those of its inputs, and [0] where no gradient is wanted."""
    return tuple(
        x.new_empty(x.shape) if is_wanted else (inputs[0] if x is None else x).new_empty(0)
        for x, is_wanted in zip(inputs, of_given(inputs, wanted), strict=True)
    )


def only_wanted(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """What an autograd formula returns of them."""
    return tuple(dx if is_wanted else None for dx, is_wanted in zip(gradients, wanted, strict=True))
