"""What the ops of this package share: rows as the kernels take them, matmuls, results, and what is checked."""

from collections.abc import Sequence

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(backend: str, op: str, name: str, x: Tensor) -> None:
    """Raises: TypeError for fp64, which GPU kernels do not have."""
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: {name} must be of dtype float32, bfloat16 or float16 on the {backend} backend, got {x.dtype}: "
            "use the reference or the cpu backend"
        )


def rows_of(x: Tensor) -> Tensor:
    """[..., C] as [rows, C] with elements of a row side by side; copied only if it is laid out otherwise."""
    flat = x.reshape(x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel(), x.shape[-1])
    return flat if flat.shape[1] < 2 or flat.stride(1) == 1 else flat.contiguous()


def contiguous(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """Parameters and gates as the kernels read them."""
    return tuple(None if x is None else x.contiguous() for x in parameters)


def is_vector(gate: Tensor | None) -> bool:
    """Whether there is a gate per channel. With one channel it is one number as well, and counts as that."""
    return gate is not None and gate.numel() != 1


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in their own dtype, or in fp32, where a stream is wider than the weights and sums need no rounding."""
    if dtype == a.dtype:
        return a @ b
    return torch.mm(a, b, out_dtype=dtype) if a.device.type == "cuda" else a.to(dtype) @ b.to(dtype)


def gradients(inputs: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """What a backward returns: empty, in its input's dtype or, for None, the first one's, where nobody wants any."""
    return tuple(
        (inputs[0] if x is None else x).new_empty(0) if dx is None else dx for x, dx in zip(inputs, values, strict=True)
    )
