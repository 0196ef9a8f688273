"""IDEFICS and Mllama (Llama 3.2 Vision) of transformers: RMS norms, separate projections, dense masks.

The cross-attention layers of both are x + tanh(gate)·attention, then x + tanh(gate)·mlp with a gated activation.
"""

import torch
from torch import Tensor, nn

from flamingo_kernels.nn._heads import split_heads
from flamingo_kernels.nn._linears import add, is_plain, is_watched, norm_arguments, project
from flamingo_kernels.nn.perceiver_resampler import LayerParts
from flamingo_kernels.ops._gated_mlp_halves import gated_mlp_of_halves
from flamingo_kernels.patch.fused import Fused, NotFused, expect_modules, expect_unwatched
from flamingo_kernels.patch.masks import DenseSeen, of_dense, remembered
from flamingo_kernels.patch.parts import Attention, resampler_layer, residual_stream, run_layers

_IMPLEMENTATIONS = ("eager", "sdpa")  # which say the same of a mask


class IdeficsGatedCrossAttentionLayer(Fused):
    """image_attention_mask hides images; where cross_attention_gate is 0, attention adds nothing."""

    SIGNATURES = (
        (
            "hidden_states",
            "attention_mask",
            "image_hidden_states",
            "image_attention_mask",
            "cross_attention_gate",
            "...",
        ),
    )

    def check_structure(self) -> None:
        _attention_of(self.cross_attn, self.input_layernorm, "q_layer_norm")
        _expect_gated_mlp(self)
        if not type(self.act_cross_attn) is type(self.act_dense) is nn.Tanh:
            raise NotFused("gates with another activation than Tanh")

    def fused_forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_hidden_states: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        cross_attention_gate: Tensor | None = None,
        *cache: object,
        **named: object,
    ) -> Tensor:
        x, media, gate = hidden_states, image_hidden_states, cross_attention_gate
        has_cache = any(value is not None for value in (*cache, named.get("cache"), named.get("past_key_values")))
        if media is None or gate is None or has_cache or media.shape[0] != x.shape[0]:
            raise NotFused("image_hidden_states and cross_attention_gate of all rows are needed, and no cache")
        if self.training and (self.config or self.cross_attn.dropout):
            raise NotFused("dropout in training")
        self.check_structure()
        attention = _attention_of(self.cross_attn, self.input_layernorm, "q_layer_norm")
        expect_unwatched(cross_attn=self.cross_attn, act_cross_attn=self.act_cross_attn, act_dense=self.act_dense)
        seen = _seen(self.cross_attn, x, media.shape[1], image_attention_mask, gate, None).seen
        k, v = _keys_values(self.cross_attn, media, attention.heads, "k_layer_norm")
        alpha = self.alpha_cross_attn.flatten()  # [1] or, of [1, 1, C], [C]
        x = attention.add_to(residual_stream(x, alpha), k, v, seen, alpha)
        return _feed_forward(x, self.post_attention_layernorm, self.mlp, self.alpha_dense.flatten())


class IdeficsPerceiverResampler(Fused):
    """[N, S, V] to [N, R, V]."""

    SIGNATURES = (("context",),)

    def check_structure(self) -> None:
        _layers_of(self)

    def fused_forward(self, context: Tensor) -> Tensor:
        layers = _layers_of(self)
        if context.ndim != 3:
            raise NotFused(f"context of rank {context.ndim}")
        return self.layer_norm(run_layers(layers, context, self.latents))


class MllamaCrossAttentionDecoderLayer(Fused):
    """cross_attention_mask hides tiles; full_text_row_masked_out_mask is 0 for tokens that see none.

    Such tokens have a mask of zeros, so they attend to everything, and their mlp is multiplied by 0.
    """

    SIGNATURES = (
        (
            "hidden_states",
            "cross_attention_states",
            "cross_attention_mask",
            "attention_mask",
            "full_text_row_masked_out_mask",
            "position_ids",
            "...",
        ),
    )

    def check_structure(self) -> None:
        _attention_of(self.cross_attn, self.input_layernorm, "q_norm")
        _expect_gated_mlp(self)

    def fused_forward(
        self,
        hidden_states: Tensor,
        cross_attention_states: Tensor | None,
        cross_attention_mask: Tensor | None,
        attention_mask: Tensor | None,
        full_text_row_masked_out_mask: Tensor | None,
        position_ids: Tensor | None = None,
        *cache: object,
        **named: object,
    ) -> Tensor:
        x, states, attn = hidden_states, cross_attention_states, self.cross_attn
        if self.training and attn.dropout:
            raise NotFused("dropout in training")
        attention = _attention_of(attn, self.input_layernorm, "q_norm")
        expect_unwatched(cross_attn=attn)
        _expect_gated_mlp(self)
        cache = cache[0] if cache else named.get("cache", named.get("past_key_values"))
        held = _cached(cache, attn.layer_idx)
        if (states is None and held is None) or (held is not None and held[0].shape[0] != x.shape[0]):
            raise NotFused("neither cross_attention_states nor cached ones of all rows")
        if states is not None:
            states = states.reshape(x.shape[0], -1, states.shape[-1])
        keys = (0 if held is None else held[0].shape[1]) + (0 if states is None else states.shape[1])
        seen, has_mlp = _seen(attn, x, keys, cross_attention_mask, None, full_text_row_masked_out_mask)
        if states is not None:
            held = _keys_values(attn, states, attn.num_key_value_heads, "k_norm")
            if cache is not None:
                held = _heads_third(*cache.update(*(t.transpose(1, 2) for t in held), attn.layer_idx))
        gate = self.cross_attn_attn_gate
        x = attention.add_to(residual_stream(x, gate), *held, seen, gate)
        y = _feed_forward(x, self.post_attention_layernorm, self.mlp, self.cross_attn_mlp_gate)
        return y if has_mlp is None else torch.where(has_mlp.unsqueeze(-1), y, x)


def _attention_of(attn: nn.Module, norm: nn.Module, q_norm: str) -> Attention:
    expect_modules(attn, "q_proj", "k_proj", "v_proj", "o_proj")
    implementation = attn.config._attn_implementation or "eager"
    if implementation not in _IMPLEMENTATIONS:
        raise NotFused(f"the attention {implementation}, where {' and '.join(_IMPLEMENTATIONS)} are supported")
    return Attention.of(norm, attn.q_proj, attn.o_proj, attn.num_heads, attn.scaling, getattr(attn, q_norm, None))


def _keys_values(attn: nn.Module, media: Tensor, heads: int, k_norm: str) -> tuple[Tensor, Tensor]:
    """k, v [B, K, G, D] of media [B, K, V]."""
    k, v = (split_heads(to(media), heads) for to in (attn.k_proj, attn.v_proj))
    return getattr(attn, k_norm, nn.Identity())(k), v


def _cached(cache: object | None, layer: int) -> tuple[Tensor, Tensor] | None:
    """k, v [B, K, G, D] that a layer has put into a cache; None if there are none yet."""
    if cache is None:
        return None
    if type(cache).__name__ != "DynamicCache":
        raise NotFused(f"a {type(cache).__name__}, where DynamicCache is supported")
    if layer >= len(cache.layers) or not cache.layers[layer].is_initialized or not cache.layers[layer].keys.numel():
        return None
    return _heads_third(cache.layers[layer].keys, cache.layers[layer].values)


def _heads_third(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k.transpose(1, 2), v.transpose(1, 2)


def _seen(
    attn: nn.Module, x: Tensor, keys: int, mask: Tensor | None, gate: Tensor | None, row: Tensor | None
) -> DenseSeen:
    """gate [B, T]: attention is zeroed where it is 0. row [B, 1, T, 1]: what the mlp is multiplied with."""
    rows, tokens = x.shape[:2]
    causal = mask is None and tokens > 1 and attn.config._attn_implementation == "sdpa"
    if causal or (row is not None and row.shape != (rows, 1, tokens, 1)):
        raise NotFused("without a mask, sdpa of transformers is causal" if causal else f"rows of {list(row.shape)}")

    def compute() -> DenseSeen:
        dense = x.new_zeros(rows, 1, tokens, keys) if mask is None else mask  # without one, everything is visible
        zeroed = None if gate is None else gate == 0
        return of_dense(dense, (rows, tokens, keys), zeroed, None if row is None else row[:, 0, :, 0])

    return remembered((mask, gate, row), (rows, tokens, keys), compute)


def _expect_gated_mlp(layer: nn.Module) -> None:
    expect_modules(layer.mlp, "gate_proj", "up_proj", "down_proj", "act_fn")
    expect_unwatched(mlp=layer.mlp)


def _feed_forward(x: Tensor, norm: nn.Module, mlp: nn.Module, gate: Tensor) -> Tensor:
    """x + tanh(gate)·down(act(gate_proj(norm(x)))·up(norm(x)))."""
    x = residual_stream(x, gate)
    linears = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    normed = norm_arguments(norm)
    tensors = (x, gate, *norm.parameters(), *mlp.parameters())
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    # without a gradient, nothing is saved by putting the two projections together, and a copy is
    if needs_gradient and normed is not None and all(map(is_plain, linears)) and _is_silu(mlp.act_fn):
        return gated_mlp_of_halves(
            x, w_gate=linears[0].weight, w_up=linears[1].weight, w_out=linears[2].weight, gate=gate, **normed
        )
    return add(x, gate, mlp.down_proj, mlp.act_fn(project(x, norm, mlp.gate_proj)) * project(x, norm, mlp.up_proj))


def _is_silu(module: nn.Module) -> bool:
    return type(module).__name__ in ("SiLU", "SiLUActivation") and not is_watched(module)


def _layers_of(resampler: nn.Module) -> list[LayerParts]:
    layers = []
    for attn, mlp in resampler.blocks:
        expect_unwatched(attention=attn, mlp=mlp)
        expect_modules(attn, "context_layer_norm", "latents_layer_norm", "q_proj", "k_proj", "v_proj", "output_proj")
        norms = (attn.q_layer_norm, attn.k_layer_norm) if attn.qk_layer_norms else (None, None)
        attention = Attention.of(
            attn.latents_layer_norm, attn.q_proj, attn.output_proj, attn.n_heads, attn.qk_scale, norms[0]
        )
        to_kv, ff = (attn.k_proj, attn.v_proj), (mlp.ln, mlp.fc, mlp.act, mlp.c_proj)
        layers.append(resampler_layer(attention, attn.context_layer_norm, to_kv, ff, norms[1]))
    return layers
