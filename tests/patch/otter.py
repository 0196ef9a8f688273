"""Otter's modules in plain PyTorch: its names of classes, parameters and arguments, and what it computes."""

import torch
from torch import Tensor, nn


def _feed_forward(dim: int) -> nn.ModuleList:
    return nn.ModuleList(
        [nn.LayerNorm(dim), nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False)]
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, visible: Tensor | None = None) -> Tensor:
    """Lowest value instead of minus infinity, as there: what sees nothing then sees everything alike."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q * scale @ k.transpose(-1, -2)
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class OtterPerceiverBlock(nn.Module):
    def __init__(self, *, dim: int, dim_head: int, heads: int) -> None:
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim_head * heads, bias=False)
        self.to_out = nn.Linear(dim_head * heads, dim, bias=False)
        self.feed_forward = _feed_forward(dim)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        z = self.norm_latents(latents)
        k, v = self.to_kv(torch.cat([self.norm_media(x), z], -2)).chunk(2, -1)
        latents = latents + self.to_out(_attend(self.to_q(z), k, v, self.heads, self.scale))
        hidden = latents
        for module in self.feed_forward:
            hidden = module(hidden)
        return latents + hidden


class OtterPerceiverResampler(nn.Module):
    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        dim_head: int,
        heads: int,
        num_latents: int,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embs = None if max_num_frames is None else nn.Parameter(torch.randn(max_num_frames, dim))
        self.media_time_embs = None if max_num_media is None else nn.Parameter(torch.randn(max_num_media, 1, dim))
        self.layers = nn.ModuleList(OtterPerceiverBlock(dim=dim, dim_head=dim_head, heads=heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        rows, media, frames = x.shape[:3]
        if self.frame_embs is not None:
            x = x + self.frame_embs[:frames, None]
        x = x.flatten(2, 3)
        if self.media_time_embs is not None:
            x = x + self.media_time_embs[:media]
        x = x.flatten(0, 1)
        latents = self.latents.expand(x.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(x, latents)
        return self.norm(latents).unflatten(0, (rows, media))


class OtterMaskedCrossAttention(nn.Module):
    def __init__(
        self, *, dim: int, dim_visual: int, dim_head: int, heads: int, only_attend_immediate_media: bool = True
    ) -> None:
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_kv = nn.Linear(dim_visual, 2 * dim_head * heads, bias=False)
        self.to_out = nn.Linear(dim_head * heads, dim, bias=False)
        self.only_attend_immediate_media = only_attend_immediate_media

    def forward(
        self, x: Tensor, media: Tensor, media_locations: Tensor | None = None, attend_previous: bool = True
    ) -> Tensor:
        num_media, per_media = media.shape[1:3]
        k, v = self.to_kv(media.flatten(1, 2)).chunk(2, -1)
        visible = time = None
        if media_locations is not None:
            time = media_locations.cumsum(1)
            if not attend_previous:
                time[~media_locations] += 1
                time[time > media_locations.sum(1, keepdim=True)] = 0
            number = torch.arange(1, num_media + 1).repeat_interleave(per_media)
            compare = torch.eq if self.only_attend_immediate_media else torch.ge
            visible = compare(time[:, None, :, None], number)
        o = _attend(self.to_q(self.norm(x)), k, v, self.heads, self.scale, visible)
        if time is not None and self.only_attend_immediate_media:
            o = o.masked_fill((time == 0)[..., None], 0)
        return self.to_out(o)


class OtterGatedCrossAttentionBlock(nn.Module):
    def __init__(self, *, dim: int, **attention: object) -> None:
        super().__init__()
        self.attn = OtterMaskedCrossAttention(dim=dim, **attention)
        self.attn_gate = nn.Parameter(torch.tensor([0.0]))
        self.feed_forward = _feed_forward(dim)
        self.ff_gate = nn.Parameter(torch.tensor([0.0]))

    def forward(
        self, x: Tensor, media: Tensor, media_locations: Tensor | None = None, attend_previous: bool = True
    ) -> Tensor:
        x = self.attn(x, media, media_locations, attend_previous) * self.attn_gate.tanh() + x
        hidden = x
        for module in self.feed_forward:
            hidden = module(hidden)
        return hidden * self.ff_gate.tanh() + x
