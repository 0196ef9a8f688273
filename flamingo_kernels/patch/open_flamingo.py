"""OpenFlamingo, Otter and flamingo-pytorch: one family of code, which differs in names and in a flag.

The flag is the fourth argument of blocks: `use_cached_media` (OpenFlamingo 2: all text comes after the last media of
`media_locations`) or `attend_previous` (Otter, OpenFlamingo 1: False lets text see the media after it).
"""

import sys

import torch
from torch import Tensor, nn

from flamingo_kernels.nn._heads import split_keys_values
from flamingo_kernels.nn._linears import is_plain
from flamingo_kernels.nn.feed_forward import feed_forward
from flamingo_kernels.nn.perceiver_resampler import LayerParts
from flamingo_kernels.ops.media_kv import media_kv
from flamingo_kernels.patch.fused import Fused, NotFused, expect_modules, expect_unwatched
from flamingo_kernels.patch.masks import Seen, everything, of_media, remembered
from flamingo_kernels.patch.parts import (
    Attention,
    feed_forward_of,
    resampler_layer,
    residual_stream,
    run_layers,
)

_TEXT = ("x", "media", "media_locations")


class MaskedCrossAttention(Fused):
    """to_out(attention(to_q(norm(x)), to_kv(media)))."""

    SIGNATURES = ((*_TEXT, "use_cached_media"), (*_TEXT, "attend_previous"), _TEXT)

    def check_structure(self) -> None:
        attention_of(self)

    def fused_forward(
        self, x: Tensor, media: Tensor, media_locations: Tensor | None = None, *flag: bool, **named: bool
    ) -> Tensor:
        attention = attention_of(self)
        seen = _seen(self, x, media, media_locations, **_named(self, flag, named))
        return self.to_out(attention.attended(x, *keys_values(self, media), seen))


class GatedCrossAttentionBlock(Fused):
    """x + tanh(attn_gate)·attn(x), then x + tanh(ff_gate)·ff(x)."""

    SIGNATURES = MaskedCrossAttention.SIGNATURES

    def check_structure(self) -> None:
        attention_of(self.attn)
        feed_forward_of(_feed_forward(self))

    def fused_forward(
        self, x: Tensor, media: Tensor, media_locations: Tensor | None = None, *flag: bool, **named: bool
    ) -> Tensor:
        expect_unwatched(attn=self.attn)
        attention, parts = attention_of(self.attn), feed_forward_of(_feed_forward(self))
        seen = _seen(self.attn, x, media, media_locations, **_named(self, flag, named))
        x = residual_stream(x, self.attn_gate)
        x = attention.add_to(x, *keys_values(self.attn, media), seen, self.attn_gate)
        norm, w_in, w_out, activation = parts
        return feed_forward(residual_stream(x, self.ff_gate), norm, w_in, w_out, self.ff_gate, activation)


class PerceiverResampler(Fused):
    """[B, M, frames, patches, V] to [B, M, R, V]; in flamingo-pytorch [B, M, S, V] or [B, S, V]."""

    SIGNATURES = (("x",),)

    def check_structure(self) -> None:
        _layers_of(self)

    def fused_forward(self, x: Tensor) -> Tensor:
        layers = _layers_of(self)
        if hasattr(self, "media_pos_emb"):  # flamingo-pytorch
            _expect_ndim(x, 3, 4)
            x = x.unsqueeze(1) if x.ndim == 3 else x
            x = x + self.media_pos_emb[: x.shape[1]]
        else:
            _expect_ndim(x, 5)
            if self.frame_embs is not None:
                x = x + self.frame_embs[: x.shape[2]].unsqueeze(1)
            x = x.flatten(2, 3)
            if self.media_time_embs is not None:
                x = x + self.media_time_embs[: x.shape[1]]
        latents = run_layers(layers, x.flatten(0, 1), self.latents)
        return self.norm(latents).unflatten(0, x.shape[:2])


def attention_of(attn: nn.Module) -> Attention:
    """What is fused of a MaskedCrossAttention."""
    expect_modules(attn, "norm", "to_q", "to_kv", "to_out")
    if getattr(sys.modules.get(type(attn).__module__), "XFORMERS_AVAIL", False):
        raise NotFused("with xformers it attends to all media, whatever media_locations says")
    return Attention.of(attn.norm, attn.to_q, attn.to_out, attn.heads, attn.scale)


def keys_values(attn: nn.Module, media: Tensor) -> tuple[Tensor, Tensor]:
    """k, v [B, K, H, D] of media [B, M, L, V]."""
    media = media.flatten(1, 2)
    if is_plain(attn.to_kv):
        return media_kv(media, [attn.to_kv.weight], attn.heads)[0]
    return split_keys_values(attn.to_kv(media), attn.heads)


def expect_media(x: Tensor, media: Tensor) -> None:
    """Raise NotFused where the original would raise, or broadcast."""
    if x.ndim != 3 or media.ndim != 4 or media.shape[0] != x.shape[0]:
        shapes = f"x of shape {list(x.shape)} and media of shape {list(media.shape)}"
        raise NotFused(f"{shapes}, where [B, T, C] and [B, M, L, V] are supported")


def _seen(
    attn: nn.Module,
    x: Tensor,
    media: Tensor,
    locations: Tensor | None,
    use_cached_media: bool = False,
    attend_previous: bool = True,
) -> Seen:
    expect_media(x, media)
    rows, tokens = x.shape[:2]
    num_media, per_media = media.shape[1:3]
    if locations is None:
        return everything(rows, tokens, num_media * per_media, x.device)
    fits = locations.ndim == 2 and locations.shape[0] == rows and (use_cached_media or locations.shape[1] == tokens)
    if not fits or locations.dtype != torch.bool:
        raise NotFused(f"media_locations of shape {list(locations.shape)} and {locations.dtype}")
    only_latest = attn.only_attend_immediate_media

    def compute() -> Seen:
        if use_cached_media:
            time = locations.sum(1, keepdim=True).expand(rows, tokens)
        else:
            time = locations.cumsum(1)
            if not attend_previous:  # the number of the media after each text, and 0 after the last one
                time = time + ~locations
                time = torch.where(time > locations.sum(1, keepdim=True), 0, time)
        return of_media(time, num_media, per_media, only_latest)

    options = (tokens, num_media, per_media, only_latest, use_cached_media, attend_previous)
    return remembered((locations,), options, compute)


def _named(block: Fused, flag: tuple, named: dict[str, bool]) -> dict[str, bool]:
    """The fourth argument by its name, which the original knows."""
    if not flag:
        return named
    if len(flag) > 1:
        raise NotFused("more than four arguments")
    return named | dict(zip(block.original_arguments()[3:], flag, strict=False))


def _feed_forward(block: nn.Module) -> nn.Module:
    return block.feed_forward if hasattr(block, "feed_forward") else block.ff  # Otter's name, the others'


def _layers_of(resampler: nn.Module) -> list[LayerParts]:
    return [_layer_of(layer) for layer in resampler.layers]


def _layer_of(layer: nn.Module) -> LayerParts:
    # Otter's layer is one module, that of the others a list of attention and feed-forward
    attn, ff = tuple(layer) if isinstance(layer, nn.ModuleList) else (layer, layer.feed_forward)
    expect_unwatched(attention=attn)
    expect_modules(attn, "norm_media", "norm_latents", "to_q", "to_kv", "to_out")
    attention = Attention.of(attn.norm_latents, attn.to_q, attn.to_out, attn.heads, attn.scale)
    return resampler_layer(attention, attn.norm_media, attn.to_kv, ff)


def _expect_ndim(x: Tensor, *ndim: int) -> None:
    if x.ndim not in ndim:
        raise NotFused(f"x of rank {x.ndim}")
