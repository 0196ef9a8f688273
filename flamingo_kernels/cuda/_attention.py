"""What the attention ops hand to their kernels: checked tensors with rows that begin and end on 16 bytes."""

import torch
from torch import Tensor

MAX_HEAD_DIM = 128
_PRECISIONS = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # enum Precision in csrc/cuda/attention.h
_TF32 = 1
_PIECE = 16  # bytes of a load


def check(op: str, q: Tensor) -> None:
    """Raises: TypeError for fp64, which these kernels do not have; ValueError for a head dim above 128."""
    if q.dtype not in _PRECISIONS:
        raise TypeError(f"{op}: q must be of dtype float32, bfloat16 or float16 on the cuda backend, got {q.dtype}")
    if q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: q must have a head dim of at most {MAX_HEAD_DIM} on the cuda backend, got {q.shape[3]}"
        )


def precision(q: Tensor) -> int:
    """How products are made: fp32 ones in tf32 where torch's own matmuls on a GPU would."""
    if q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return _TF32
    return _PRECISIONS[q.dtype]


def rowwise(x: Tensor) -> Tensor:
    """x [.., .., .., D] with rows in one piece that begin on 16 bytes, and D rounded up to so many with zeros.

    Copied only if it is not so.
    """
    per_piece = _PIECE // x.element_size()
    missing = -x.shape[3] % per_piece if x.shape[3] else per_piece
    if missing:
        return torch.nn.functional.pad(x, (0, missing)).contiguous()
    aligned = x.data_ptr() % _PIECE == 0 and all(s % per_piece == 0 for s in x.stride()[:3])
    if x.stride(3) == 1 and aligned:
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


def view(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides, as the module takes them."""
    return x.data_ptr(), *x.stride()[:3]


def narrowed(x: Tensor, D: int) -> Tensor:
    """A contiguous x without what rowwise added to its rows."""
    return x if x.shape[3] == D else x[..., :D].contiguous()
