"""Both modules against plain PyTorch: output and every gradient within the error budget, in every dtype."""

import pytest
import torch
from torch import Tensor

import flamingo_kernels as fk
from tests.nn import dense_flamingo
from tests.support.process import DTYPES, pick

BLOCK_OPS = pytest.mark.ops("norm_linear", "masked_cross_attention", "media_kv", "linear_gate_residual", "gated_mlp")
RESAMPLER_OPS = pytest.mark.ops("norm_linear", "latent_attention", "media_kv", "linear_gate_residual", "gated_mlp")
BLOCKS = {
    "paper": {},
    "gelu": {"activation": "gelu", "attend": "all"},
    "idefics": {"activation": "swiglu", "norm": "rms", "qk_norm": True, "ff_dim": 40, "attend": "all"},
    "llama": {
        "activation": "swiglu",
        "norm": "rms",
        "qk_norm": True,
        "kv_heads": 2,
        "skip_mlp_without_media": True,
        "attend": "group",
    },
    "vector": {"gate": "vector", "activation": "gelu_tanh", "ff_mult": 2, "attend": "next"},
    "relu_gqa": {"activation": "relu", "kv_heads": 1},
    "silu": {"activation": "silu", "norm": "rms"},
    "beams": {"rows": 6},
    "skip": {"skip_mlp_without_media": True},
    "anything": {"attend": None, "skip_mlp_without_media": True},
}
RESAMPLERS = {
    "plain": {},
    "frames": {"max_frames": 3},
    "frames_media": {"max_frames": 8, "max_media": 4, "activation": "gelu"},
    "ragged": {"max_frames": 3, "max_media": 3, "frame_counts": True},
    "masked": {"token_mask": True, "qk_norm": True, "activation": "swiglu"},
    "both": {"max_frames": 2, "frame_counts": True, "token_mask": True, "ff_mult": 2},
    "one_frame_embedding": {"max_frames": 1, "frame_counts": True},
}


@BLOCK_OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", pick(list(BLOCKS), ["paper", "llama"]))
def test_gated_block(backend, name, dtype):
    if backend.name in ("triton", "cuda") and dtype == torch.float64:
        pytest.skip("fp64 is for the cpu and reference backends")
    options = {"heads": 4, "dim_head": 16, **BLOCKS[name]}
    attend, rows = options.pop("attend", "latest"), options.pop("rows", 2)
    generator = torch.Generator().manual_seed(1)
    T, M, L, C, V = 19, 3, 5, 24, 20
    if attend is None:
        intervals = fk.Intervals(*torch.randint(0, M * L + 1, (2, rows, T), generator=generator, dtype=torch.int32))
    else:
        locations = torch.zeros(rows, T, dtype=torch.bool)
        for row in locations:
            row[torch.randperm(T - 3, generator=generator)[:M] + 2] = True  # the first two tokens see nothing
        intervals = fk.media_intervals(locations, L, M, attend=attend)
    position = torch.arange(M * L)
    start, end = (x.unsqueeze(-1) for x in intervals)
    visible = ((start <= position) & (position < end)).to(backend.device)
    assert not visible.any(-1).all()
    intervals = fk.Intervals(*(x.to(backend.device) for x in intervals))
    block = fk.nn.GatedCrossAttentionBlock(C, V, **options).to(backend.device, dtype)
    dense_flamingo.randomize(block)
    inputs = _normal(generator, backend.device, dtype, x=(rows, T, C), media=(2, M, L, V))
    kept = {key: options[key] for key in ("activation", "skip_mlp_without_media") if key in options}

    def dense(p: dict[str, Tensor], i: dict[str, Tensor]) -> Tensor:
        return dense_flamingo.gated_block(p, i["x"], i["media"].flatten(1, 2), visible, heads=4, **kept)

    dense_flamingo.assert_module_right(block, lambda module, i: module(i["x"], i["media"], intervals), dense, inputs)


@BLOCK_OPS
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", pick(DTYPES, DTYPES[:1]), ids=str)
def test_gated_block_without_media(backend, dtype, skip):
    block = fk.nn.GatedCrossAttentionBlock(24, 20, skip_mlp_without_media=skip).to(backend.device, dtype)
    dense_flamingo.randomize(block)
    inputs = _normal(torch.Generator().manual_seed(2), backend.device, dtype, x=(2, 7, 24))
    if skip:
        assert torch.equal(block(inputs["x"]), inputs["x"])
        return

    def dense(p: dict[str, Tensor], i: dict[str, Tensor]) -> Tensor:
        return dense_flamingo.gated_block(p, i["x"], None, None, heads=8)

    dense_flamingo.assert_module_right(block, lambda module, i: module(i["x"]), dense, inputs)


@RESAMPLER_OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", pick(list(RESAMPLERS), ["ragged"]))
def test_resampler(backend, name, dtype):
    if backend.name in ("triton", "cuda") and dtype == torch.float64:
        pytest.skip("fp64 is for the cpu and reference backends")
    options = {"depth": 2, "heads": 2, "dim_head": 16, "num_latents": 5, **RESAMPLERS[name]}
    ragged, masked = options.pop("frame_counts", False), options.pop("token_mask", False)
    generator = torch.Generator().manual_seed(3)
    B, M, frames, patches, V = 2, 3, 4, 6, 24
    counts = torch.tensor([[4, 0, 1], [2, 3, 4]]) if ragged else torch.full((B, M), frames)
    mask = torch.ones(B, M, frames, patches, dtype=torch.bool)
    if masked:
        mask = torch.rand(mask.shape, generator=generator) < 0.6
        mask[0, 2] = False  # a media with nothing to see
    module = fk.nn.PerceiverResampler(V, **options).to(backend.device, dtype)
    dense_flamingo.randomize(module)
    inputs = _normal(generator, backend.device, dtype, x=(B, M, frames, patches, V))
    activation = options.get("activation", "squared_relu")
    given = {"frame_counts": counts.to(backend.device) if ragged else None}
    given["token_mask"] = mask.to(backend.device) if masked else None

    def dense(p: dict[str, Tensor], i: dict[str, Tensor]) -> Tensor:
        return dense_flamingo.resampler(p, i["x"], mask, counts, heads=2, activation=activation)

    dense_flamingo.assert_module_right(module, lambda module, i: module(i["x"], **given), dense, inputs)


def _normal(generator: torch.Generator, device: str, dtype: torch.dtype, **shapes: tuple) -> dict[str, Tensor]:
    return {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}
