"""Masked cross-attention in CUDA C++: csrc/cuda/masked_cross_attention*.cuh say how."""

import torch
from torch import Tensor

from flamingo_kernels._gpu.positions import check_intervals
from flamingo_kernels.cuda import _attention
from flamingo_kernels.cuda._module import module, stream_of

_OP = "masked_cross_attention"
MAX_HEAD_DIM = _attention.MAX_HEAD_DIM
_KEYS = 64  # of a block in backward: for each, the tokens that see it are a run


def forward(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """o [B, T, H, D] contiguous in q's dtype, lse fp32 [B, H, T]. Shapes as in the public op.

    Raises:
        TypeError: fp64, which these kernels do not have.
        ValueError: D > 128, or intervals of CPU tensors outside 0..K; on a GPU they are clamped.
    """
    _check(q, k, start, end)
    B, T, H, D = q.shape
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse
    q, k, v = (_attention.rowwise(x) for x in (q, k, v))
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    start, end = start.contiguous(), end.contiguous()
    with torch.cuda.device_of(q):
        module().masked_cross_attention.forward(
            _attention.precision(q),
            _sizes(q, k),
            *(_attention.view(x) for x in (q, k, v)),
            *(x.data_ptr() for x in (start, end, o, lse)),
            softmax_scale,
            stream_of(q),
        )
    return _attention.narrowed(o, D), lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    o: Tensor,
    lse: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous in the inputs' dtypes; dk and dv sum over the heads and rows that share keys.

    Raises: as forward.
    """
    _check(q, k, start, end)
    if lse.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format), *(
            torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v)
        )
    D = q.shape[3]
    do, q, k, v, o = (_attention.rowwise(x) for x in (do, q, k, v, o.contiguous()))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    start, end, lse = start.contiguous(), end.contiguous(), lse.contiguous()
    runs = torch.empty((q.shape[0], -(-k.shape[1] // _KEYS), 2), dtype=torch.int32, device=q.device)
    delta = torch.empty_like(lse)
    with torch.cuda.device_of(q):
        module().masked_cross_attention.backward(
            _attention.precision(q),
            _sizes(q, k),
            *(_attention.view(x) for x in (do, q, k, v)),
            *(x.data_ptr() for x in (start, end, o, lse, runs, delta, dq, dk, dv)),
            softmax_scale,
            stream_of(q),
        )
    return tuple(_attention.narrowed(x, D) for x in (dq, dk, dv))


def _sizes(q: Tensor, k: Tensor) -> tuple[int, ...]:
    """B, T, K, H, G, D and how many rows read the same keys, of tensors as the kernels take them."""
    B, T, H, D = q.shape
    return B, T, k.shape[1], H, k.shape[2], D, B // k.shape[0]


def _check(q: Tensor, k: Tensor, start: Tensor, end: Tensor) -> None:
    _attention.check(_OP, q)
    check_intervals(_OP, start, end, k.shape[1])
