"""flamingo-mini's modules in plain PyTorch: its names of classes, parameters and arguments, and what it computes."""

import torch
from torch import Tensor, nn


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


_ACTIVATIONS = {"gelu": nn.GELU, "sqrelu": SquaredReLU, "relu": nn.ReLU}


def _feed_forward(dim: int, act: str) -> nn.Sequential:
    w_in, w_out = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)
    return nn.Sequential(nn.LayerNorm(dim), w_in, _ACTIVATIONS[act](), w_out)


def _heads_first(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class MaskedCrossAttention(nn.Module):
    def __init__(self, *, dim: int, dim_visual: int, dim_head: int, heads: int, n_visual: int) -> None:
        super().__init__()
        self.scale, self.heads, self.n_visual = dim_head**-0.5, heads, n_visual
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_kv = nn.Linear(dim_visual, 2 * dim_head * heads, bias=False)
        self.to_out = nn.Linear(dim_head * heads, dim, bias=False)

    def forward(self, y, media_locations, visual_features=None, previous_kv=None, output_kv=False):
        q = _heads_first(self.to_q(self.norm(y)) * self.scale, self.heads)
        if previous_kv is None:
            k, v = (_heads_first(x, self.heads) for x in self.to_kv(visual_features.flatten(1, 2)).chunk(2, -1))
        else:
            k, v = previous_kv
        time = media_locations.cumsum(1)
        if previous_kv is not None:
            time = time[:, -y.shape[1] :]
        number = torch.arange(1, visual_features.shape[1] + 1).repeat_interleave(self.n_visual)
        visible = time[:, None, :, None] == number
        scores = (q @ k.transpose(-1, -2)).masked_fill(~visible, -torch.finfo(q.dtype).max)
        p = scores.softmax(-1).masked_fill((time == 0)[:, None, :, None], 0)
        out = self.to_out((p @ v).transpose(1, 2).flatten(2))
        return out, (k, v) if output_kv else None


class GatedCrossAttentionBlock(nn.Module):
    def __init__(self, *, dim: int, act: str = "gelu", **attention: int) -> None:
        super().__init__()
        self.attn = MaskedCrossAttention(dim=dim, **attention)
        self.alpha_attn = nn.Parameter(torch.tensor([0.0]))
        self.ffw = _feed_forward(dim, act)
        self.alpha_ffw = nn.Parameter(torch.tensor([0.0]))

    def forward(self, y, visual_features, media_locations, previous_kv=None, output_kv=False):
        out, kv = self.attn(y, media_locations, visual_features, previous_kv=previous_kv, output_kv=output_kv)
        y = y + self.alpha_attn.tanh() * out
        return y + self.alpha_ffw.tanh() * self.ffw(y), kv


class PerceiverAttentionLayer(nn.Module):
    def __init__(self, *, dim: int, dim_head: int, heads: int) -> None:
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_k = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_v = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_out = nn.Linear(dim_head * heads, dim, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        z = self.norm_latents(latents)
        both = torch.cat([self.norm_media(features), z], 1)
        q, k, v = (_heads_first(x, self.heads) for x in (self.to_q(z), self.to_k(both), self.to_v(both)))
        return self.to_out(((q * self.scale @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class PerceiverResampler(nn.Module):
    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        dim_head: int,
        heads: int,
        num_latents: int,
        num_time_embeds: int = 4,
        act: str = "gelu",
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.time_pos_emb = nn.Parameter(torch.randn(num_time_embeds, 1, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttentionLayer(dim=dim, dim_head=dim_head, heads=heads), _feed_forward(dim, act)])
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_f: Tensor) -> Tensor:
        x_f = x_f.unsqueeze(1) if x_f.ndim == 3 else x_f
        x_f = (x_f + self.time_pos_emb[: x_f.shape[1]]).flatten(1, 2)
        x = self.latents.expand(x_f.shape[0], -1, -1)
        for attn, ffw in self.layers:
            x = x + attn(x_f, x)
            x = x + ffw(x)
        return self.norm(x)
