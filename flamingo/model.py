"""Flamingo: vision encoder -> resampler -> gated blocks in front of every n-th layer of a frozen language model."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import flamingo_kernels as fk
from flamingo.ablations import MLPResampler, TransformerResampler, UngatedBlock, VanillaBlock
from flamingo.config import FlamingoConfig
from flamingo.language import before_layer, call_names, decoder_layers, freeze, redrawn
from flamingo_kernels.nn.gated_cross_attention import project_media

BLOCKS = {"gated": fk.nn.GatedCrossAttentionBlock, "ungated": UngatedBlock, "vanilla": VanillaBlock}


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
        """For each row `times` in a row. They share keys and values, so nothing is copied."""
        return dataclasses.replace(self, media_seen=self.media_seen.repeat_interleave(times))


class Flamingo(nn.Module):
    """A language model that reads images; only the resampler and the gated blocks are trained.

    The language model itself is not changed: hooks run the blocks, and only inside `forward` and `reads`, so that
    calling `lm` directly is the plain model still. Nothing before the first block keeps anything for backward, because
    nothing there is trained. New parameters are fp32; with an LM in bf16 or fp16 they run under autocast.

    Args:
        lm: a Hugging Face causal language model; it is frozen, unless config says otherwise.
        vision: images [..., channels, height, width] to features [..., S, V] of width `vision.dim`; frozen likewise.
        config: the sizes of the new parts. Its `language` and `vision` are not looked at: `language.build_lm` and
            `vision.build_vision` build them.
    """

    def __init__(self, lm: nn.Module, vision: nn.Module, config: FlamingoConfig) -> None:
        super().__init__()
        self.config = config
        self.lm = freeze(redrawn(lm) if config.lm_weights == "scratch" else lm)
        self.lm.requires_grad_(config.lm_weights != "frozen")
        self.vision = freeze(vision).requires_grad_(config.vision_weights != "frozen")
        self.resampler = _resampler(vision.dim, config)
        layers = decoder_layers(self.lm)
        self.block_layers = config.block_layers(len(layers))
        if not self.block_layers:
            raise ValueError(f"Flamingo: offset must be below the LM's {len(layers)} layers, got {config.offset}")
        sizes = {name: getattr(config, name) for name in ("heads", "dim_head", "ff_mult", "activation")}
        block, dim = BLOCKS[config.cross_attention], self.lm.config.hidden_size
        self.blocks = nn.ModuleList(block(dim, vision.dim, **sizes) for _ in self.block_layers)
        for number, index in enumerate(self.block_layers):
            before_layer(layers[index], functools.partial(self._run_block, number))
        self._reading: tuple[list | None, fk.Intervals | None] | None = None  # of the forward pass under way

    def train(self, mode: bool = True) -> "Flamingo":
        """Training mode for what is trained. The vision encoder stays without dropout in any case."""
        super().train(mode)
        self.lm.train(mode and self.config.lm_weights != "frozen")
        self.vision.eval()
        return self

    def unfreeze_vision(self, resolution: int | None = None) -> None:
        """Train the vision encoder from now on, and at another resolution (pixels a side) if one is given.

        Position embeddings are interpolated, as in the paper's fine-tuning at a higher resolution. The configuration
        then says so.
        """
        described = self.config.vision
        if resolution is not None:
            self.vision.resize(resolution)
            described = described and dataclasses.replace(described, resolution=resolution)
        self.vision.requires_grad_(True)
        self.config = dataclasses.replace(self.config, vision_weights="tuned", vision=described)

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained, by name: resampler and gated blocks, and what else the configuration does not freeze."""
        parts = ["resampler.", "blocks."]
        parts += ["lm."] if self.config.lm_weights != "frozen" else []
        parts += ["vision."] if self.config.vision_weights != "frozen" else []
        return {name: p for name, p in self.named_parameters() if name.startswith(tuple(parts))}

    def new_state_dict(self) -> dict[str, Tensor]:
        """The values of the new parameters."""
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
        """tanh of the gates, [blocks, 2]: of the attention and of the feed-forward; 1 where there are none."""
        if self.config.cross_attention != "gated":
            return self.resampler.latents.new_ones(len(self.blocks), 2)
        return torch.stack([torch.cat([b.attn_gate, b.ff_gate]).detach().tanh() for b in self.blocks])

    def encode(self, images: Tensor) -> Tensor:
        """Visual features of images [..., channels, height, width]: [..., S, V]; without gradients where frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.vision_weights != "frozen"):
            return self.vision(images)

    def condition(
        self, media: Tensor | None, rows: int, *, frame_counts: Tensor | None = None, after: Conditioning | None = None
    ) -> Conditioning:
        """Resample media (None: no media) and project them for all blocks, once per prompt.

        Args:
            media: [B, M, frames, S, V].
            rows: B, which media of None do not tell.
            frame_counts: int [B, M], the frames that a media really has; None: all.
            after: of what was read before: the result holds its media too, in each row behind one another.
        """
        if after is None:
            after = Conditioning(None, torch.zeros(rows, dtype=torch.int64, device=self.resampler.latents.device))
        if media is None:
            return after
        with self._precision():
            latents = self.resampler(media.to(self.resampler.latents.dtype), frame_counts=frame_counts)
            kv = project_media(self.blocks, latents)
        return dataclasses.replace(after, kv=kv if after.kv is None else self._append(after, kv))

    def forward(
        self,
        input_ids: Tensor,
        conditioning: Conditioning,
        media_locations: Tensor,
        attention_mask: Tensor,
        *,
        attend_next: Tensor | None = None,
        document_start: Tensor | None = None,
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
            document_start: bool [B, T], where each document of a row begins. A document is read as it would be in a row
                of its own: positions start anew, and neither text nor media of another are seen. For training: without
                a cache, with an LM whose attention is "eager" or "sdpa", and with MPT in newer transformers only. None:
                a row is one document.
            cache: a Hugging Face cache, which this call extends; None: nothing is kept.
            logits_to_keep: only of the last so many positions, or of those listed (int64 [n]); 0: of all.

        Returns:
            logits [B, T or n, vocabulary] in the LM's dtype.

        Raises:
            ValueError: a row has more media tokens than media, or documents where they cannot be kept apart.
        """
        reading = (conditioning.kv, self._intervals(conditioning, media_locations, attend_next, document_start))
        # left padding does not count as a position
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        names = call_names(self.lm)
        if document_start is not None:
            # older transformers' MPT, the LM without positions, takes such a mask for its opposite
            misread = "position_ids" not in names and names["cache"] == "past_key_values"
            if cache is not None or misread or self.lm.config._attn_implementation not in ("eager", "sdpa"):
                raise ValueError("Flamingo: document_start must be None with a cache or such a language model")
            begun = torch.where(document_start, position_ids, 0).cummax(1).values
            position_ids = position_ids - begun
            attention_mask = _within_documents(attention_mask, document_start, self.lm.dtype)
        values = {"cache": cache, "position_ids": position_ids, "logits_to_keep": logits_to_keep}
        optional = {called: values[name] for name, called in names.items()}
        self._reading = reading
        try:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": cache is not None}
            logits = self.lm(**inputs, **optional).logits
        finally:
            self._reading = None
        if "logits_to_keep" in names:
            return logits
        return logits[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]

    @contextlib.contextmanager
    def reads(self, conditioning: Conditioning, media_locations: Tensor) -> Iterator[None]:
        """Inside, `lm` itself reads the media, call after call, so that Hugging Face's `generate` may drive it.

        media_locations: bool [B, T] of the tokens that it will be given next; there are no media after those. It may be
        given each row several times in a row (beams); they share their media.
        """

        def look(lm: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal conditioning, media_locations
            rows, length = kwargs["input_ids"].shape
            times = rows // len(media_locations)
            here = nn.functional.pad(media_locations, (0, length))[:, :length]
            intervals = self._intervals(conditioning.repeat(times), here.repeat_interleave(times, 0))
            self._reading = (conditioning.kv, intervals)
            conditioning, media_locations = conditioning.after(here), media_locations[:, length:]

        handle = self.lm.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._reading = None

    def _intervals(
        self,
        conditioning: Conditioning,
        media_locations: Tensor,
        attend_next: Tensor | None = None,
        document_start: Tensor | None = None,
    ) -> fk.Intervals | None:
        if conditioning.kv is None:
            if media_locations.any():
                raise ValueError("Flamingo: conditioning must hold media where media_locations is True, got none")
            return None
        options = {"document_start": document_start, "media_seen": conditioning.media_seen}
        look = functools.partial(fk.media_intervals, media_locations, self.config.latents, **options)
        intervals = look(conditioning.kv[0][0].shape[1] // self.config.latents, attend=self.config.attend)
        if attend_next is None:
            return intervals
        # without num_media, which counts the padding of rows with fewer: nothing comes after a row's last
        either = functools.partial(torch.where, attend_next[:, None])
        return fk.Intervals(*map(either, look(attend="next"), intervals))

    def _append(self, before: Conditioning, kv: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values with a row's new media right behind those that it has seen."""
        old, new = (pairs[0][0].shape[1] // self.config.latents for pairs in (before.kv, kv))
        place = torch.arange(old + new, device=before.media_seen.device)
        seen = before.media_seen[:, None]
        media = torch.where(place < seen, place, (old + place - seen).clamp(max=old + new - 1))  # [B, old + new]
        row = torch.arange(len(media), device=media.device)[:, None]

        def merge(a: Tensor, b: Tensor) -> Tensor:
            a = a.repeat_interleave(len(b) // len(a), 0)  # what rows shared so far
            parts = torch.cat([a, b], dim=1).unflatten(1, (old + new, self.config.latents))
            return parts[row, media].flatten(1, 2)

        return [tuple(map(merge, *pairs)) for pairs in zip(before.kv, kv, strict=True)]

    def _run_block(self, index: int, hidden: Tensor) -> Tensor:
        """The hidden states [B, T, C] before a layer of the LM, behind the gated block that stands there."""
        if self._reading is None:
            return hidden
        kv, intervals = self._reading
        block = self.blocks[index]
        with self._precision():
            x = hidden.to(block.attn_norm.weight.dtype)
            return block(x, intervals=intervals, kv=None if kv is None else kv[index]).to(hidden.dtype)

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.lm.dtype not in (torch.bfloat16, torch.float16):
            return contextlib.nullcontext()
        return torch.autocast(self.lm.device.type, self.lm.dtype)


def _resampler(dim: int, config: FlamingoConfig) -> nn.Module:
    sizes = {"depth": config.resampler_depth, "num_latents": config.latents, "ff_mult": config.resampler_ff_mult}
    if config.resampler == "mlp":
        return MLPResampler(dim, **sizes)
    sizes |= {"heads": config.resampler_heads, "max_frames": config.max_frames}
    if config.resampler == "transformer":
        return TransformerResampler(dim, **sizes)
    return fk.nn.PerceiverResampler(dim, dim_head=config.resampler_dim_head, activation=config.activation, **sizes)


def _within_documents(attention_mask: Tensor, document_start: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores, [B, 1, T, T]: 0 for a token's own document up to itself, else the least."""
    document = document_start.cumsum(1)
    same = document[:, :, None] == document[:, None, :]
    itself = torch.eye(document.shape[1], dtype=torch.bool, device=document.device)  # padding too sees something
    visible = same.tril() & attention_mask.bool()[:, None, :] | itself
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min).unsqueeze(1)
