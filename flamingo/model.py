"""Flamingo: vision encoder -> resampler -> gated blocks in front of every n-th layer of a frozen language model."""

import contextlib
import dataclasses
import functools

import torch
from torch import Tensor, nn

import flamingo_kernels as fk
from flamingo.config import FlamingoConfig
from flamingo.language import before_layer, decoder_layers, freeze
from flamingo_kernels.nn.gated_cross_attention import project_media


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What the gated blocks need of a prompt besides its text.

    kv: per block, k and v [B, K, H, D] of all media, projected once; None where there are no media.
    media_seen: int64 [B], the media whose tokens came before the next chunk of text.
    """

    kv: list[tuple[Tensor, Tensor]] | None
    media_seen: Tensor

    def after(self, media_locations: Tensor) -> "Conditioning":
        """For the text behind a chunk with these media tokens, bool [B, T]."""
        return dataclasses.replace(self, media_seen=self.media_seen + media_locations.sum(1))

    def repeat(self, times: int) -> "Conditioning":
        """For each row `times` in a row. The copies share their keys and values, so nothing is copied."""
        return dataclasses.replace(self, media_seen=self.media_seen.repeat_interleave(times))


class Flamingo(nn.Module):
    """A language model that reads images; only the resampler and the gated blocks are trained.

    The language model itself is not changed: hooks run the blocks, and only inside `forward`, so that calling `lm`
    directly is the plain model still. New parameters are fp32; with an LM in bf16 or fp16 they run under autocast.

    Args:
        lm: a Hugging Face causal language model; it is frozen.
        vision: images to features [..., S, V] of width `vision.dim`; it is frozen.
        config: the sizes of the new parts.
    """

    def __init__(self, lm: nn.Module, vision: nn.Module, config: FlamingoConfig) -> None:
        super().__init__()
        self.config = config
        self.lm = freeze(lm)
        self.vision = freeze(vision)
        self.resampler = fk.nn.PerceiverResampler(
            vision.dim,
            depth=config.resampler_depth,
            heads=config.resampler_heads,
            dim_head=config.resampler_dim_head,
            num_latents=config.latents,
        )
        layers = decoder_layers(lm)
        self.block_layers = list(range(0, len(layers), config.every))
        self.blocks = nn.ModuleList(
            fk.nn.GatedCrossAttentionBlock(
                lm.config.hidden_size, vision.dim, heads=config.heads, dim_head=config.dim_head, ff_mult=config.ff_mult
            )
            for _ in self.block_layers
        )
        for block, index in enumerate(self.block_layers):
            before_layer(layers[index], functools.partial(self._run_block, block))
        self._reading: tuple[list | None, fk.Intervals | None] | None = None  # of the forward pass under way

    def train(self, mode: bool = True) -> "Flamingo":
        """Training mode for the new parts; the frozen ones stay without dropout."""
        super().train(mode)
        self.lm.eval()
        self.vision.eval()
        return self

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of resampler and gated blocks, by name: all that is trained."""
        return {name: p for name, p in self.named_parameters() if name.startswith(("resampler.", "blocks."))}

    def new_state_dict(self) -> dict[str, Tensor]:
        """The state of the new parameters alone; `load_new_state_dict` reads it."""
        return {name: p.detach() for name, p in self.new_parameters().items()}

    def load_new_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load what `new_state_dict` gave.

        Raises:
            ValueError: names are missing or unknown.
            RuntimeError: shapes do not fit.
        """
        wrong = sorted(state.keys() ^ self.new_parameters().keys())
        if wrong:
            raise ValueError(f"load_new_state_dict: state must hold the new parameters, wrong or missing: {wrong}")
        self.load_state_dict(state, strict=False)

    def gates(self) -> Tensor:
        """tanh of the gates, [blocks, 2]: of the attention and of the feed-forward."""
        return torch.stack([torch.cat([b.attn_gate, b.ff_gate]).detach().tanh() for b in self.blocks])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Visual features of images [..., channels, height, width]: [..., S, V], from the frozen encoder."""
        return self.vision(images)

    def condition(self, media: Tensor | None, rows: int) -> Conditioning:
        """Resample media [B, M, frames, S, V] (None: no media) and project them for all blocks, once per prompt.

        rows: B, which media of None do not tell.
        """
        device = self.resampler.latents.device
        media_seen = torch.zeros(rows, dtype=torch.int64, device=device)
        if media is None:
            return Conditioning(None, media_seen)
        with self._precision():
            return Conditioning(project_media(self.blocks, self.resampler(media)), media_seen)

    def forward(
        self,
        input_ids: Tensor,
        conditioning: Conditioning,
        media_locations: Tensor,
        attention_mask: Tensor,
        *,
        attend_next: Tensor | None = None,
        cache=None,
        logits_to_keep: int | Tensor = 0,
    ) -> Tensor:
        """Next-token logits of a chunk of text.

        Args:
            input_ids: int64 [B, T].
            conditioning: `condition(media)`, and `.after(...)` the chunks before this one.
            media_locations: bool [B, T].
            attention_mask: int64 [B, T] with 0 on padding; with a cache [B, cached + T].
            attend_next: bool [B], rows that attend as "next" and not as the configuration says; None: no row.
            cache: a Hugging Face cache, which this call extends; None: nothing is kept.
            logits_to_keep: only of the last so many positions, or of those listed (int64 [n]); 0: of all.

        Returns:
            logits [B, T or n, vocabulary] in the LM's dtype.

        Raises:
            ValueError: a row has more media tokens than media.
        """
        intervals = None
        if conditioning.kv is not None:
            intervals = fk.media_intervals(
                media_locations,
                self.config.latents,
                conditioning.kv[0][0].shape[1] // self.config.latents,
                attend=self.config.attend,
                media_seen=conditioning.media_seen,
            )
            if attend_next is not None:
                # without num_media, which counts the padding of rows with fewer: nothing comes after a row's last
                following = fk.media_intervals(
                    media_locations, self.config.latents, attend="next", media_seen=conditioning.media_seen
                )
                either = functools.partial(torch.where, attend_next[:, None])
                intervals = fk.Intervals(*map(either, following, intervals))
        elif media_locations.any():
            raise ValueError("Flamingo: conditioning must hold media where media_locations is True, got none")
        # left padding does not count as a position
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        self._reading = (conditioning.kv, intervals)
        try:
            output = self.lm(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=logits_to_keep,
            )
        finally:
            self._reading = None
        return output.logits

    def _run_block(self, index: int, hidden: Tensor) -> Tensor:
        """The hidden states [B, T, C] before a layer of the LM, behind the gated block that stands there."""
        if self._reading is None:
            return hidden
        kv, intervals = self._reading
        block = self.blocks[index]
        with self._precision():
            x = hidden.to(block.attn_gate.dtype)
            return block(x, intervals=intervals, kv=None if kv is None else kv[index]).to(hidden.dtype)

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.lm.dtype not in (torch.bfloat16, torch.float16):
            return contextlib.nullcontext()
        return torch.autocast(self.lm.device.type, self.lm.dtype)
