"""Gated blocks and resamplers on the modules of foreign ones, taken apart the way `fk.nn` names them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flamingo_kernels.nn._linears import add
from flamingo_kernels.nn.gated_cross_attention import attend, queries
from flamingo_kernels.nn.perceiver_resampler import LayerParts, media_keys_values, resample
from flamingo_kernels.ops.masked_cross_attention import masked_cross_attention
from flamingo_kernels.patch.fused import NotFused, expect_unwatched
from flamingo_kernels.patch.masks import Seen

_ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "silu"}


@dataclass(frozen=True)
class Attention:
    """What makes queries, and what takes the heads together."""

    norm: nn.Module
    to_q: nn.Module
    to_out: nn.Module
    heads: int
    q_norm: nn.Module | None = None

    @staticmethod
    def of(
        norm: nn.Module, to_q: nn.Module, to_out: nn.Module, heads: int, scale: float, q_norm: nn.Module | None = None
    ) -> "Attention":
        """Raises NotFused where scores are not divided by sqrt(D)."""
        dim_head = getattr(to_q, "out_features", to_q.weight.shape[0]) // heads  # quantised weights are packed
        if abs(scale * dim_head**0.5 - 1) > 1e-6:
            raise NotFused(f"scores are multiplied by {scale}, where {dim_head}**-0.5 is supported")
        return Attention(norm, to_q, to_out, heads, q_norm)

    def attended(self, x: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
        """x [B, T, C]; k, v [B, K, G, D] -> [B, T, H·D]."""
        q = queries(x, self.norm, self.to_q, self.q_norm, self.heads)
        o = masked_cross_attention(q, k, v, seen.intervals)
        if seen.even is not None:
            mean = v.mean(1, keepdim=True).repeat_interleave(self.heads // v.shape[2], 2)
            o = torch.where(seen.even[..., None, None], mean.to(o.dtype), o)
        return o.flatten(2)

    def add_to(self, x: Tensor, k: Tensor, v: Tensor, seen: Seen, gate: Tensor) -> Tensor:
        """x + tanh(gate)·to_out(attended)."""
        if seen.even is None:
            return attend(x, k, v, seen.intervals, self.norm, self.to_q, self.q_norm, self.to_out, gate, self.heads)
        return add(x, gate, self.to_out, self.attended(x, k, v, seen))


def resampler_layer(
    attention: Attention,
    media_norm: nn.Module,
    to_kv: nn.Module | tuple[nn.Module, nn.Module],
    ff: Sequence[nn.Module],
    k_norm: nn.Module | None = None,
) -> LayerParts:
    """ff: as `feed_forward_of` takes it."""
    ff_norm, w_in, w_out, activation = feed_forward_of(ff)
    return LayerParts(
        heads=attention.heads,
        activation=activation,
        media_norm=media_norm,
        latent_norm=attention.norm,
        to_q=attention.to_q,
        to_kv=to_kv,
        q_norm=attention.q_norm,
        k_norm=k_norm,
        to_out=attention.to_out,
        ff_norm=ff_norm,
        w_in=w_in,
        w_out=w_out,
    )


def run_layers(layers: Sequence[LayerParts], x: Tensor, latents: Tensor) -> Tensor:
    """Media x [N, S, V] and latents [R, V] to latents [N, R, V], before the last norm."""
    latents = latents.unsqueeze(0)
    for layer, (k, v) in zip(layers, media_keys_values(layers, x), strict=True):
        latents = resample(layer, latents, k, v)
    return latents.expand(x.shape[0], -1, -1)


def feed_forward_of(ff: Sequence[nn.Module]) -> tuple[nn.Module, nn.Module, nn.Module, str]:
    """norm, w_in, w_out and the activation of modules that are called one after the other, the activation third."""
    if isinstance(ff, nn.Module):
        expect_unwatched(feed_forward=ff)
    if len(ff) != 4:
        raise NotFused(f"a feed-forward of {len(ff)} modules, where norm, linear, activation, linear is supported")
    norm, w_in, activation, w_out = ff
    return norm, w_in, w_out, _activation_of(activation)


def residual_stream(x: Tensor, gate: Tensor) -> Tensor:
    """x in the dtype that eager code adds in: the wider of its own and the gate's."""
    return x.to(torch.promote_types(x.dtype, gate.dtype))


def _activation_of(module: nn.Module) -> str:
    kind = type(module)
    expect_unwatched(activation=module)
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if kind in _ACTIVATIONS:
        return _ACTIVATIONS[kind]
    if kind.__name__ == "SquaredReLU" and "flamingo" in kind.__module__:
        return "squared_relu"
    raise NotFused(f"the activation {kind.__name__}, where GELU, ReLU, SiLU and SquaredReLU are supported")
