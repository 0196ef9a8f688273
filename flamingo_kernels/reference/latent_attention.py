"""Latent attention in plain PyTorch: masked cross-attention over the keys [latents, media].

With the latents first, what every query of media n sees is one interval, 0 <= j < R' + media_lengths[n].
"""

import torch
from torch import Tensor

from flamingo_kernels.reference import masked_cross_attention


def forward(
    q: Tensor,
    k_media: Tensor,
    v_media: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    media_lengths: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """o [N, R, H, D] like q, lse [N, H, R] in the accumulation dtype. Shapes as in the public op."""
    start, end = _intervals(q, k_media, k_latents, media_lengths)
    k, v = torch.cat([k_latents, k_media], 1), torch.cat([v_latents, v_media], 1)
    return masked_cross_attention.forward(q, k, v, start, end, softmax_scale)


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
    """dq, dk_media, dv_media, dk_latents, dv_latents."""
    start, end = _intervals(q, k_media, k_latents, media_lengths)
    k, v = torch.cat([k_latents, k_media], 1), torch.cat([v_latents, v_media], 1)
    dq, dk, dv = masked_cross_attention.backward(do, q, k, v, start, end, o, lse, softmax_scale)
    latents = k_latents.shape[1]
    gradients = (dk[:, latents:], dv[:, latents:], dk[:, :latents], dv[:, :latents])
    return dq, *(x.clone(memory_format=torch.contiguous_format) for x in gradients)


def _intervals(q: Tensor, k_media: Tensor, k_latents: Tensor, media_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """start and end int32 [N, R]. Lengths outside 0..S: ValueError on the CPU, clamped on a GPU."""
    rows, tokens = k_media.shape[:2]
    if media_lengths is None:
        media_lengths = torch.full((rows,), tokens, dtype=torch.int32, device=q.device)
    elif media_lengths.device.type != "cpu":
        media_lengths = media_lengths.clamp(0, tokens)
    elif rows and (media_lengths.min() < 0 or media_lengths.max() > tokens):
        raise ValueError(
            f"latent_attention: media_lengths must lie within 0..{tokens}, the tokens of a media, got "
            f"{media_lengths.min()} to {media_lengths.max()}"
        )
    end = (media_lengths + k_latents.shape[1]).unsqueeze(1).expand(q.shape[:2])
    return torch.zeros_like(end), end
