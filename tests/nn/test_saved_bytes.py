"""What both modules keep for backward: the formulas of their docstrings, to the byte."""

import pytest
import torch
from torch import Tensor, nn

import flamingo_kernels as fk
from benchmarks.memory import saved_bytes
from tests.nn.test_numerics import BLOCK_OPS, RESAMPLER_OPS
from tests.support.process import DTYPES, Backend, pick

B, T, C, V, M, L, H, D = 3, 7, 24, 20, 2, 5, 4, 8
R, FRAMES, PATCHES = 6, 2, 5
LSE = {torch.float64: 8}  # bytes per number; 4 in the other dtypes


def bytes_of(module: nn.Module, x: Tensor, *args: object, inputs: tuple[Tensor, ...] = (), **options: object) -> int:
    """Of one forward, besides x, the other inputs and the parameters."""
    leaves = (x, *inputs, *module.parameters())
    return saved_bytes(lambda *_: module(x, *args, **options), leaves)[0]


def wanted(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """An input that takes a gradient, which is where most is kept."""
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def intervals(device: str) -> fk.Intervals:
    ends = torch.zeros(B, T, dtype=torch.int32, device=device)
    return fk.Intervals(ends, ends + L)


def block(device: str, dtype: torch.dtype, **options: object) -> fk.nn.GatedCrossAttentionBlock:
    return fk.nn.GatedCrossAttentionBlock(C, V, heads=H, dim_head=D, **options).to(device, dtype)


def of_block(made: fk.nn.GatedCrossAttentionBlock, backend: Backend, e: int, e_x: int, lse: int) -> int:
    n, m = B * T, B * M * L
    of_heads = 2 if backend.name in ("triton", "cuda") else 1  # what attention gives; the queries
    rows_in = made.w_in.weight.shape[0]
    return e_x * n * C + e * (of_heads * n * H * D + 2 * m * made.kv_heads * D + n * rows_in) + lse * n * H + 8 * n


def skip_fp64(backend, dtype: torch.dtype) -> None:
    if backend.name in ("triton", "cuda") and dtype == torch.float64:
        pytest.skip("fp64 is for the cpu and reference backends")


@BLOCK_OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 1, "norm": "rms", "activation": "swiglu", "ff_dim": 40},
        {"gate": "vector", "activation": "gelu"},
        {"skip_mlp_without_media": True},
    ],
)
def test_gated_block(backend, options, dtype):
    skip_fp64(backend, dtype)
    made = block(backend.device, dtype, **options)
    x, media = (wanted(backend.device, dtype, *shape) for shape in ((B, T, C), (B, M, L, V)))
    skipped = B * T if made.skip_mlp_without_media else 0
    expected = of_block(made, backend, dtype.itemsize, dtype.itemsize, LSE.get(dtype, 4)) + skipped
    assert bytes_of(made, x, media, intervals(backend.device), inputs=(media,)) == expected


@BLOCK_OPS
def test_gated_block_with_projected_media_and_without_any(backend):
    made = block(backend.device, torch.float32)
    x = wanted(backend.device, torch.float32, B, T, C)
    keys_values = wanted(backend.device, torch.float32, 2, B, M * L, H, D)
    of_keys_values = 4 * keys_values.numel()
    actual = bytes_of(made, x, None, intervals(backend.device), kv=tuple(keys_values), inputs=(keys_values,))
    assert actual == of_block(made, backend, 4, 4, 4) - of_keys_values
    assert bytes_of(made, x) == 4 * B * T * made.w_in.weight.shape[0]


@BLOCK_OPS
@pytest.mark.parametrize("dtype", pick([torch.bfloat16, torch.float16], [torch.bfloat16]), ids=str)
def test_gated_block_under_autocast(backend, dtype):
    made = block(backend.device, torch.float32)
    x, media = (wanted(backend.device, torch.float32, *shape) for shape in ((B, T, C), (B, M, L, V)))
    with torch.autocast(backend.device, dtype):
        actual = bytes_of(made, x, media, intervals(backend.device), inputs=(media,))
    cast = media.numel() + sum(p.numel() for p in made.parameters() if p.ndim == 2)
    assert actual == of_block(made, backend, 2, 4, 4) + 2 * cast


def resampler(device: str, dtype: torch.dtype, **options: object) -> fk.nn.PerceiverResampler:
    options = {"depth": 2, "heads": H, "dim_head": D, "num_latents": R, **options}
    return fk.nn.PerceiverResampler(V, **options).to(device, dtype)


def of_resampler(made: fk.nn.PerceiverResampler, e: int, e_x: int, lse: int) -> int:
    """Without what the last norm keeps."""
    N, S, total = B * M, FRAMES * PATCHES, 0
    for i, layer in enumerate(made.layers):
        n, rows_in = R if i == 0 else N * R, layer.w_in.weight.shape[0]
        total += e * (2 * N * S * H * D + 3 * n * H * D + N * R * (H * D + rows_in))
        total += 2 * e_x * N * R * V + lse * N * R * H
    return total


def of_last_norm(device: str, dtype: torch.dtype) -> int:
    """torch's: mean and 1/std of each latent, on a CPU in its own dtype, on a GPU in fp32."""
    return 2 * B * M * R * (dtype.itemsize if device == "cpu" else max(dtype.itemsize, 4))


@RESAMPLER_OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"depth": 1}, {"depth": 3, "activation": "swiglu"}, {"depth": 0}])
def test_resampler(backend, options, dtype):
    skip_fp64(backend, dtype)
    made = resampler(backend.device, dtype, **options)
    expected = of_resampler(made, dtype.itemsize, dtype.itemsize, LSE.get(dtype, 4))
    x = wanted(backend.device, dtype, B, M, FRAMES, PATCHES, V)
    assert bytes_of(made, x) == expected + of_last_norm(backend.device, dtype)


@RESAMPLER_OPS
@pytest.mark.parametrize(
    ("option", "copies", "per_token", "per_media"),
    [("max_media", 1, 0, 0), ("frame_counts", 1, 1, 4), ("token_mask", 2, 9, 4)],
)
def test_resampler_that_changes_its_media(backend, option, copies, per_token, per_media):
    """Then the media are kept as they were changed, not as they came."""
    device = backend.device
    made = resampler(device, torch.float32, **({"max_media": M} if option == "max_media" else {}))
    masks = {
        "frame_counts": torch.ones(B, M, dtype=torch.int64, device=device),
        "token_mask": torch.ones(B, M, FRAMES, PATCHES, dtype=torch.bool, device=device),
    }
    x = wanted(device, torch.float32, B, M, FRAMES, PATCHES, V)
    tokens, last = B * M * FRAMES * PATCHES, of_last_norm(device, torch.float32)
    added = copies * 4 * tokens * V + per_token * tokens + per_media * B * M
    given = {name: mask for name, mask in masks.items() if name == option}
    assert bytes_of(made, x, **given) == of_resampler(made, 4, 4, 4) + last + added


@RESAMPLER_OPS
@pytest.mark.parametrize("dtype", pick([torch.bfloat16, torch.float16], [torch.bfloat16]), ids=str)
def test_resampler_under_autocast(backend, dtype):
    made = resampler(backend.device, torch.float32)
    x = wanted(backend.device, torch.float32, B, M, FRAMES, PATCHES, V)
    with torch.autocast(backend.device, dtype):
        actual = bytes_of(made, x)
    linears = {name: p.numel() for name, p in made.named_parameters() if p.ndim == 2 and name != "latents"}
    cast = x.numel() + sum(linears.values()) + sum(size for name, size in linears.items() if "to_kv" in name)
    assert actual == of_resampler(made, 2, 4, 4) + of_last_norm(backend.device, torch.float32) + 2 * cast
