"""flamingo-mini: the OpenFlamingo family with other names, and keys and values that are handed in and out."""

from torch import Tensor, nn

from flamingo_kernels.nn.feed_forward import feed_forward
from flamingo_kernels.nn.perceiver_resampler import LayerParts
from flamingo_kernels.patch.fused import Fused, NotFused, expect_modules, expect_unwatched
from flamingo_kernels.patch.masks import Seen, of_media, remembered
from flamingo_kernels.patch.open_flamingo import attention_of, expect_media, keys_values
from flamingo_kernels.patch.parts import (
    Attention,
    feed_forward_of,
    resampler_layer,
    residual_stream,
    run_layers,
)

KeysValues = tuple[Tensor, Tensor]  # each [B, H, K, D]


class MaskedCrossAttention(Fused):
    """The attention alone, and its keys and values if they are asked for."""

    SIGNATURES = (("y", "media_locations", "visual_features", "previous_kv", "output_kv"),)

    def check_structure(self) -> None:
        attention_of(self)

    def fused_forward(
        self,
        y: Tensor,
        media_locations: Tensor,
        visual_features: Tensor | None = None,
        previous_kv: KeysValues | None = None,
        output_kv: bool = False,
    ) -> tuple[Tensor, KeysValues | None]:
        attention = attention_of(self)
        k, v, seen = _keys_values_seen(self, y, media_locations, visual_features, previous_kv)
        return self.to_out(attention.attended(y, k, v, seen)), _heads_first(k, v) if output_kv else None


class GatedCrossAttentionBlock(Fused):
    """y + tanh(alpha_attn)·attn(y), then y + tanh(alpha_ffw)·ffw(y)."""

    SIGNATURES = (("y", "visual_features", "media_locations", "previous_kv", "output_kv"),)

    def check_structure(self) -> None:
        attention_of(self.attn)
        feed_forward_of(self.ffw)

    def fused_forward(
        self,
        y: Tensor,
        visual_features: Tensor | None,
        media_locations: Tensor,
        previous_kv: KeysValues | None = None,
        output_kv: bool = False,
    ) -> tuple[Tensor, KeysValues | None]:
        expect_unwatched(attn=self.attn)
        attention = attention_of(self.attn)
        norm, w_in, w_out, activation = feed_forward_of(self.ffw)
        k, v, seen = _keys_values_seen(self.attn, y, media_locations, visual_features, previous_kv)
        y = attention.add_to(residual_stream(y, self.alpha_attn), k, v, seen, self.alpha_attn)
        y = feed_forward(residual_stream(y, self.alpha_ffw), norm, w_in, w_out, self.alpha_ffw, activation)
        return y, _heads_first(k, v) if output_kv else None


class PerceiverResampler(Fused):
    """[B, frames, patches, V], or [B, S, V] of one frame, to [B, R, V]."""

    SIGNATURES = (("x_f",),)

    def check_structure(self) -> None:
        _layers_of(self)

    def fused_forward(self, x_f: Tensor) -> Tensor:
        layers = _layers_of(self)
        if x_f.ndim not in (3, 4):
            raise NotFused(f"x_f of rank {x_f.ndim}")
        x = x_f.unsqueeze(1) if x_f.ndim == 3 else x_f
        x = x + self.time_pos_emb[: x.shape[1]]
        return self.norm(run_layers(layers, x.flatten(1, 2), self.latents))


def _keys_values_seen(
    attn: nn.Module, y: Tensor, locations: Tensor, features: Tensor | None, previous_kv: KeysValues | None
) -> tuple[Tensor, Tensor, Seen]:
    """k, v [B, K, H, D], and what sees them: the latest media, of which locations count, bool or int [B, T or more]."""
    if features is None or locations.ndim != 2:
        raise NotFused("visual_features and media_locations are needed")
    rows, tokens = y.shape[:2]
    num_media, per_media = features.shape[1], attn.n_visual
    if previous_kv is None:
        expect_media(y, features)
        have = features.shape[0], features.shape[1] * features.shape[2]
    else:
        have = previous_kv[0].shape[0], previous_kv[0].shape[2]
    if have != (rows, num_media * per_media):
        raise NotFused(f"{have[1]} keys for {num_media} media of {per_media} tokens")
    if locations.shape[0] != rows or (locations.shape[1] < tokens if previous_kv else locations.shape[1] != tokens):
        raise NotFused(f"media_locations of shape {list(locations.shape)}")

    def compute() -> Seen:
        return of_media(locations.cumsum(1)[:, locations.shape[1] - tokens :], num_media, per_media, only_latest=True)

    seen = remembered((locations,), (tokens, num_media, per_media), compute)
    k, v = keys_values(attn, features) if previous_kv is None else (x.transpose(1, 2) for x in previous_kv)
    return k, v, seen


def _heads_first(k: Tensor, v: Tensor) -> KeysValues:
    return k.transpose(1, 2), v.transpose(1, 2)


def _layers_of(resampler: nn.Module) -> list[LayerParts]:
    layers = []
    for attn, ffw in resampler.layers:
        expect_unwatched(attention=attn)
        expect_modules(attn, "norm_media", "norm_latents", "to_q", "to_k", "to_v", "to_out")
        attention = Attention.of(attn.norm_latents, attn.to_q, attn.to_out, attn.heads, attn.scale)
        layers.append(resampler_layer(attention, attn.norm_media, (attn.to_k, attn.to_v), ffw))
    return layers
