"""What the paper compares its modules with: blocks without gates, and other resamplers (section 3.3, table 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_kernels.nn import GatedCrossAttentionBlock, PerceiverResampler


class UngatedBlock(GatedCrossAttentionBlock):
    """Attention and feed-forward with no gates before their residuals, so not the identity at the start."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.attn_gate = self.ff_gate = None

    def reset_parameters(self) -> None:
        """There are no gates to close."""


class VanillaBlock(UngatedBlock):
    """x + attention of norm(x) to the media: no gate, and no feed-forward but that of the language model's layer."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.ff_norm = self.w_in = self.w_out = None

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x

    def _feed_forward_arguments(self) -> None:
        """There is nothing that could be fused with attention."""


class TransformerResampler(PerceiverResampler):
    """Self-attention over media tokens and latents together; the latents come out.

    Args: as `PerceiverResampler`'s, but that heads are as wide as dim / heads makes them.
    """

    def __init__(
        self, dim: int, *, depth: int, heads: int, num_latents: int, max_frames: int | None, ff_mult: float
    ) -> None:
        super().__init__(dim, depth=0, num_latents=num_latents, max_frames=max_frames)
        layer = nn.TransformerEncoderLayer(
            dim, heads, int(dim * ff_mult), 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, x: Tensor, *, frame_counts: Tensor | None = None) -> Tensor:
        """[B, M, frames, patches, V], frame_counts int [B, M] -> [B, M, R, V]."""
        rows, num_media, frames, patches, _ = x.shape
        if self.frame_embeddings is not None:
            x = x + self._frame_embeddings(frames, frame_counts).unsqueeze(-2)
        latents = self.latents.expand(rows * num_media, -1, -1)
        hidden = None
        if frame_counts is not None:
            hidden = ~_real_frames(frames, frame_counts).flatten(0, 1).repeat_interleave(patches, 1)
            hidden = F.pad(hidden, (0, latents.shape[1]), value=False)
        tokens = torch.cat([x.flatten(0, 1).flatten(1, 2), latents], dim=1)
        tokens = self.encoder(tokens, src_key_padding_mask=hidden)
        return self.norm(tokens[:, -latents.shape[1] :]).unflatten(0, (rows, num_media))


class MLPResampler(nn.Module):
    """Patches, averaged over a media's frames and pooled in their order to R tokens, through residual feed-forwards."""

    def __init__(self, dim: int, *, depth: int, num_latents: int, ff_mult: float) -> None:
        super().__init__()
        hidden = int(dim * ff_mult)
        self.latents = nn.Parameter(0.02 * torch.randn(num_latents, dim))  # which of the R places it is
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, *, frame_counts: Tensor | None = None) -> Tensor:
        """[B, M, frames, patches, V], frame_counts int [B, M] -> [B, M, R, V]."""
        if frame_counts is None:
            x = x.mean(2)
        else:
            real = _real_frames(x.shape[2], frame_counts)[..., None, None]
            x = x.where(real, 0).sum(2) / frame_counts.clamp(min=1)[..., None, None]
        pooled = F.adaptive_avg_pool1d(x.flatten(0, 1).transpose(1, 2), len(self.latents)).transpose(1, 2)
        x = pooled.unflatten(0, x.shape[:2]) + self.latents
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x)


def _real_frames(frames: int, frame_counts: Tensor) -> Tensor:
    """bool [B, M, frames]."""
    return torch.arange(frames, device=frame_counts.device) < frame_counts.unsqueeze(-1)
