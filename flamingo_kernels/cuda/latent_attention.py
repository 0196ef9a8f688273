"""Latent attention in CUDA C++: csrc/cuda/latent_attention*.cuh say how."""

import torch
from torch import Tensor

from flamingo_kernels._gpu.positions import check_lengths
from flamingo_kernels._gpu.splits import parts_of, splits_of
from flamingo_kernels.cuda import _attention
from flamingo_kernels.cuda._module import module, stream_of

_OP = "latent_attention"
MAX_HEAD_DIM = _attention.MAX_HEAD_DIM
_KEYS = 64  # of a block, about: as many as a split must be worth


def forward(
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    media_lengths: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """o [N, R, H, D] contiguous in q's dtype, lse fp32 [N, H, R]. Shapes as in the public op.

    Raises:
        TypeError: fp64, which these kernels do not have.
        ValueError: D > 128, or lengths of CPU tensors outside 0..S; on a GPU they are clamped.
    """
    _check(q, k_media, media_lengths)
    N, R, H, D = q.shape
    lse = torch.empty((N, H, R), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse
    q, *keys = (_attention.rowwise(x) for x in (q, k_media, v_media, k_latents, v_latents))
    media_lengths = _contiguous(media_lengths)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _, splits, sizes = _sizes(q, keys)
    parts, part_lse = parts_of(o, splits), parts_of(lse, splits)
    with torch.cuda.device_of(q):
        module().latent_attention.forward(
            _attention.precision(q),
            sizes,
            _inputs(q, keys, media_lengths),
            parts.data_ptr(),
            part_lse.data_ptr(),
            softmax_scale,
            stream_of(q),
        )
        if splits > 1:
            _merge(parts, o, part_lse, lse)
    return _attention.narrowed(o, D), lse


def backward(
    do: Tensor,
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    media_lengths: Tensor | None,
    o: Tensor,
    lse: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk_media, dv_media, dk_latents, dv_latents, contiguous in the inputs' dtypes.

    Raises: as forward.
    """
    _check(q, k_media, media_lengths)
    if lse.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format), *(
            torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k_media, v_media, k_latents, v_latents)
        )
    D = q.shape[3]
    do, o, q, *keys = (_attention.rowwise(x) for x in (do, o.contiguous(), q, k_media, v_media, k_latents, v_latents))
    lse, media_lengths = lse.contiguous(), _contiguous(media_lengths)
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, *keys)]
    tiles, splits, sizes = _sizes(q, keys)
    parts = [parts_of(gradients[0], splits), *(parts_of(x, tiles) for x in gradients[1:])]
    with torch.cuda.device_of(q):
        module().latent_attention.backward(
            _attention.precision(q),
            sizes,
            _attention.view(do),
            _inputs(q, keys, media_lengths),
            o.data_ptr(),
            lse.data_ptr(),
            *(x.data_ptr() for x in parts),
            softmax_scale,
            stream_of(q),
        )
        for part, gradient in zip(parts, gradients, strict=True):
            if part is not gradient and gradient.numel():
                _merge(part, gradient)
    return tuple(_attention.narrowed(x, D) for x in gradients)


def _sizes(q: Tensor, keys: list[Tensor]) -> tuple[int, int, tuple[int, ...]]:
    """Tiles of the query rows of a key head, blocks of threads that share the keys of each, and all as the kernels
    take it."""
    (N, R, H, D), (S, G), latents = q.shape, keys[0].shape[1:3], keys[2].shape[1]
    tiles = -(-R * (H // G) // module().latent_attention.QUERY_ROWS)
    splits = splits_of(q, tiles * G * N, -(-S // _KEYS) - (-latents // _KEYS))
    return tiles, splits, (N, R, S, latents, H, G, D, splits)


def _inputs(q: Tensor, keys: list[Tensor], media_lengths: Tensor | None) -> tuple[object, ...]:
    return *(_attention.view(x) for x in (q, *keys)), 0 if media_lengths is None else media_lengths.data_ptr()


def _contiguous(media_lengths: Tensor | None) -> Tensor | None:
    return None if media_lengths is None else media_lengths.contiguous()


def _merge(parts: Tensor, out: Tensor, part_lse: Tensor | None = None, lse: Tensor | None = None) -> None:
    """out = Σ parts, or, with the lse of the parts, the attention over all their keys."""
    _, R, H, D = out.shape
    module().latent_attention.merge(
        _attention.precision(out),
        parts.data_ptr(),
        0 if part_lse is None else part_lse.data_ptr(),
        out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        out.shape[:3].numel(),
        R,
        H,
        D,
        len(parts),
        stream_of(out),
    )


def _check(q: Tensor, k_media: Tensor, media_lengths: Tensor | None) -> None:
    _attention.check(_OP, q)
    check_lengths(_OP, media_lengths, k_media.shape[1])
