"""A Flamingo whose resampler and gated blocks are plain PyTorch: dense masks, autograd's gradients, no op of ours."""

import torch
from torch import Tensor

from flamingo import Flamingo
from flamingo.model import Conditioning
from tests.nn import dense_flamingo


class PlainFlamingo(Flamingo):
    """The parameters and the language model of a Flamingo; its media are handed to the blocks as they are."""

    def condition(self, media: Tensor, rows: int, *, frame_counts: Tensor | None = None) -> Conditioning:
        assert frame_counts is None
        valid = torch.ones(media.shape[:4], dtype=torch.bool)
        frames = torch.full(media.shape[:2], media.shape[2])
        parameters = dict(self.resampler.named_parameters())
        latents = dense_flamingo.resampler(parameters, media, valid, frames, heads=self.config.resampler_heads)
        latents = latents.flatten(1, 2)
        return Conditioning([(latents, latents)] * len(self.blocks), torch.zeros(rows, dtype=torch.int64))

    def _run_block(self, index: int, hidden: Tensor) -> Tensor:
        if self._reading is None:
            return hidden
        kv, intervals = self._reading
        media, _ = kv[index]
        start, end = (position.unsqueeze(-1) for position in intervals)
        key = torch.arange(media.shape[1])
        visible = (start <= key) & (key < end)
        parameters = dict(self.blocks[index].named_parameters())
        return dense_flamingo.gated_block(parameters, hidden, media, visible, heads=self.config.heads)
