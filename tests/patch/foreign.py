"""Blocks and resamplers of every foreign package, with inputs: what to build, and how to call it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tests.nn.dense_flamingo import randomize
from tests.patch import flamingo_mini, otter
from tests.support.public import public

B, T, M, L, C, V, HEADS, DIM_HEAD = 2, 17, 3, 4, 24, 20, 4, 8
HEAD_OPTIONS = {"heads": HEADS, "dim_head": DIM_HEAD}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Foreign:
    """shapes: of the inputs that need gradients. call(module, inputs) gives one tensor.

    relu: (norm, linear) in front of each relu of a module.
    """

    build: Callable[[], nn.Module]
    shapes: dict[str, tuple[int, ...]]
    call: Callable[[nn.Module, Tensors], Tensor]
    relu: Callable[[nn.Module], list[tuple[nn.Module, nn.Module]]] = lambda module: []

    def module(self) -> nn.Module:
        """One with weights from a seed, in fp32."""
        module = self.build()
        randomize(module)
        for norm, linear in self.relu(module):
            _keep_away_from_zero(norm, linear)
        return module

    def inputs(self) -> Tensors:
        generator = torch.Generator().manual_seed(1)
        return {name: torch.randn(shape, generator=generator) for name, shape in self.shapes.items()}


@torch.no_grad()
def _keep_away_from_zero(norm: nn.LayerNorm, linear: nn.Linear) -> None:
    """Half of what the linear gives is near 2, half near -2: across 0, rounding would change the derivative by 1."""
    direction = nn.functional.normalize(norm.bias, dim=0)
    sign = torch.tensor([1.0, -1.0]).repeat(linear.weight.shape[0] // 2)
    norm.weight.mul_(0.3)
    norm.bias.copy_(2 * direction)
    linear.weight.mul_(0.3).add_(sign[:, None] * direction)


def locations(*rows: list[int], tokens: int = T) -> Tensor:
    """bool [B, tokens] with media tokens at these places."""
    where = torch.zeros(len(rows), tokens, dtype=torch.bool)
    for row, places in zip(where, rows, strict=True):
        row[places] = True
    return where


LOCATIONS = locations([2, 7, 8], [0, 9])  # the second row has a media that no text sees
TOO_MANY = locations([2, 7, 8], [0, 4, 9, 13])  # more media tokens than media


def _text_on_media(build: Callable[[], nn.Module], *flags: object, media_width: int = V, **named: object) -> Foreign:
    shapes = {"x": (B, T, C), "media": (B, M, L, media_width)}
    return Foreign(build, shapes, lambda module, i: module(i["x"], i["media"], *flags, **named))


def family(
    package: str, kind: str = "GatedCrossAttentionBlock", *flags: object, latest: bool = True, **named
) -> Foreign:
    """A block, or its attention alone, of OpenFlamingo, flamingo-pytorch or Otter."""
    wide = {} if package == "flamingo_pytorch" else {"dim_visual": V}

    def build() -> nn.Module:
        classes = otter if package == "otter" else public(package)
        made = getattr(classes, f"Otter{kind}" if package == "otter" else kind)
        return made(dim=C, **wide, **HEAD_OPTIONS, only_attend_immediate_media=latest)

    return _text_on_media(build, *flags, media_width=wide.get("dim_visual", C), **named)


def mini(act: str = "gelu", where: Tensor = LOCATIONS) -> Foreign:
    options = {"dim": C, "dim_visual": V, **HEAD_OPTIONS, "n_visual": L, "act": act}
    shapes = {"y": (B, T, C), "media": (B, M, L, V)}

    def call(module: nn.Module, i: Tensors) -> Tensor:
        out, kv = module(i["y"], i["media"], where, output_kv=True)
        return torch.cat([out.flatten(), *(t.flatten() for t in kv)])  # so that both have gradients

    relu = (lambda block: [block.ffw[:2]]) if act == "relu" else (lambda block: [])
    return Foreign(lambda: flamingo_mini.GatedCrossAttentionBlock(**options), shapes, call, relu)


def resampler(package: str, **options: object) -> Foreign:
    frames, sizes = 3, {"dim": V, "depth": 2, **HEAD_OPTIONS, "num_latents": 5, **options}

    def build() -> nn.Module:
        if package == "flamingo_mini":
            return flamingo_mini.PerceiverResampler(**sizes)
        return (
            otter.OtterPerceiverResampler(**sizes)
            if package == "otter"
            else public(package).PerceiverResampler(**sizes)
        )

    shape = {"flamingo_mini": (B, frames, 6, V), "flamingo_pytorch": (B, M, 6, V)}.get(package, (B, M, frames, 6, V))
    return Foreign(build, {"x": shape}, lambda module, i: module(i["x"]))


def _modeling(name: str):
    return pytest.importorskip(f"transformers.models.{name}.modeling_{name}", reason="transformers is not installed")


def idefics_config(**options: object):
    config = {"hidden_size": HEADS * DIM_HEAD, "num_attention_heads": HEADS, "intermediate_size": 40}
    config |= {"vision_config": {"embed_dim": V}, "rms_norm_eps": 1e-5, "alpha_initializer": "ones"}
    config = _modeling("idefics").IdeficsConfig(**config | options)
    config._attn_implementation = options.get("attn_implementation", "eager")
    return config


def intervals_to_visible(*rows: list[tuple[int, int]]) -> Tensor:
    """bool [B, T, M·L] from the media [first, last) that each run of tokens sees; rows of runs of equal length."""
    media = torch.zeros(len(rows), T, M, dtype=torch.bool)
    for row, runs in zip(media, rows, strict=True):
        for token in range(T):
            first, last = runs[token * len(runs) // T]
            row[token, first:last] = True
    return media.repeat_interleave(L, 2)


VISIBLE = intervals_to_visible([(0, 0), (0, 1), (0, 2), (1, 3)], [(0, 3), (2, 3), (0, 0), (1, 2)])


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, K]: 0 where a key is visible, else the lowest value."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def idefics(visible: Tensor = VISIBLE, **options: object) -> Foreign:
    def call(module: nn.Module, i: Tensors) -> Tensor:
        mask = additive(visible, i["x"].dtype)
        gate = visible.any(-1).to(i["x"].dtype)
        return module(i["x"], None, i["media"], image_attention_mask=mask, cross_attention_gate=gate)

    shapes = {"x": (B, T, HEADS * DIM_HEAD), "media": (B, M * L, V)}
    layer = lambda: _modeling("idefics").IdeficsGatedCrossAttentionLayer(idefics_config(**options), layer_idx=0)  # noqa: E731
    return Foreign(layer, shapes, call)


def idefics_resampler(qk_norm: bool = False) -> Foreign:
    def build() -> nn.Module:
        config = idefics_config(perceiver_config={"qk_layer_norms_perceiver": qk_norm})
        perceiver = pytest.importorskip("transformers.models.idefics.perceiver")
        return perceiver.IdeficsPerceiverResampler(config, V, 2, HEADS, DIM_HEAD, 5)

    relu = lambda module: [(mlp.ln, mlp.fc) for _, mlp in module.blocks]  # noqa: E731
    return Foreign(build, {"x": (B * M, 6, V)}, lambda module, i: module(i["x"]), relu)


def mllama_config(**options: object):
    sizes = {"hidden_size": HEADS * DIM_HEAD, "num_attention_heads": HEADS, "num_key_value_heads": 2}
    config = _modeling("mllama").MllamaTextConfig(**sizes | {"intermediate_size": 40} | options)
    config._attn_implementation = options.get("attn_implementation", "eager")
    return config


def mllama_masks(visible: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As the model makes them: a token that sees nothing gets a mask of zeros, and a 0 in the second mask."""
    sees = visible.any(-1)
    return additive(visible | ~sees[..., None], dtype), sees[:, None, :, None].to(dtype)


def mllama(visible: Tensor = VISIBLE, **options: object) -> Foreign:
    def call(module: nn.Module, i: Tensors) -> Tensor:
        mask, row = mllama_masks(visible, i["x"].dtype)
        return module(i["x"], i["media"], mask, None, row)

    shapes = {"x": (B, T, HEADS * DIM_HEAD), "media": (B, M * L, HEADS * DIM_HEAD)}
    layer = lambda: _modeling("mllama").MllamaCrossAttentionDecoderLayer(mllama_config(**options), layer_idx=0)  # noqa: E731
    return Foreign(layer, shapes, call)


def in_fp64(module: nn.Module) -> nn.Module:
    """A copy in fp64, also where transformers computes in fp32 whatever comes: in its RMS norms and eager softmax."""
    module = copy.deepcopy(module).double()
    for part in module.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = _rms_norm_of(part)
        if hasattr(getattr(part, "config", None), "_attn_implementation"):
            part.config._attn_implementation = "sdpa"
    return module


def _rms_norm_of(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: nn.functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
