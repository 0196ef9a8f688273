"""The rivals compute what the op computes, and the shapes and the work counted are what the design says."""

import pytest
import torch

import flamingo_kernels as fk
from benchmarks import bench_masked_cross_attention as attention
from benchmarks.harness import FORWARD, TRAINING, Case, ErrorBudget, Unavailable, results
from benchmarks.shapes import LATENTS, SHAPES, Shape

CPU = torch.device("cpu")
TRAINED = Shape("tiny", 3, 11, 3, 2, 16, 24, 40)
DECODED = Shape("tiny decode", 3, 1, 3, 2, 16, 24, 40, beams=3, trains=False)


@pytest.mark.parametrize("shape", [TRAINED, DECODED], ids=["trained", "decoded"])
def test_the_fp64_reference_is_the_op(shape: Shape) -> None:
    case = attention.case(shape, torch.float64, CPU)
    theirs = results(attention.eager(case), list(case.work)[-1])
    with fk.use_backend("reference"):
        ours = results(attention.ours(case), list(case.work)[-1])
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


# torch.compile and FlexAttention take long to compile; benchmarks/test_bench.py runs them behind the same check.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [TRAINED, DECODED], ids=["trained", "decoded"])
@pytest.mark.parametrize(
    "name",
    [
        "SDPA, masked",
        "SDPA per image",
        "SDPA per image, aligned",
        "eager per image",
        "eager per image, aligned",
    ],
)
def test_rivals_are_right(name: str, shape: Shape, dtype: torch.dtype) -> None:
    case = attention.case(shape, dtype, CPU)
    (provider,) = (provider for provider in attention.PROVIDERS if provider.name == name)
    if name.endswith("aligned") and shape is DECODED:
        with pytest.raises(Unavailable, match="beams share"):
            provider.prepare(case)
    else:
        check(case, provider.prepare(case), attention.PROVIDERS[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [TRAINED, DECODED], ids=["trained", "decoded"])
def test_ours_is_right(backend, shape: Shape, dtype: torch.dtype) -> None:
    case = attention.case(shape, dtype, torch.device(backend.device))
    check(case, attention.ours(case), attention.PROVIDERS[0])


def check(case: Case, prepared, plain) -> None:
    for pass_ in case.work:
        assert ErrorBudget(case, plain, pass_).spent(results(prepared, pass_)) <= 1


def test_segments_are_runs_of_one_image_over_all_rows() -> None:
    assert attention.setting(TRAINED, CPU).segments() == [
        (1, None), (3, 0), (3, 1), (4, 2), (1, None), (3, 3), (3, 4), (4, 5), (1, None), (3, 6), (3, 7), (4, 8)
    ]  # fmt: skip
    assert attention.setting(DECODED, CPU).segments() == [(3, 2)]


def test_work_counts_visible_pairs_and_each_byte_once() -> None:
    where, dtype = attention.setting(TRAINED, CPU), torch.bfloat16
    text, keys, channels = 2 * 3 * 11 * 32, 2 * 3 * 3 * LATENTS * 32, 32
    assert attention.work(where, dtype)[FORWARD].flops == 4 * channels * 3 * 10 * LATENTS
    assert attention.work(where, dtype)[TRAINING].flops == 3.5 * 4 * channels * 3 * 10 * LATENTS
    assert attention.work(where, dtype)[FORWARD].bytes == 2 * text + 2 * keys
    assert attention.work(where, dtype)[TRAINING].bytes == 6 * text + 6 * keys
    one_image = 2 * LATENTS * 32
    decoded = attention.work(attention.setting(DECODED, CPU), dtype)
    assert list(decoded) == [FORWARD]
    assert decoded[FORWARD].bytes == 2 * (2 * 3 * 32) + 2 * one_image


def test_every_shape_sees_each_of_its_media() -> None:
    for shape in SHAPES.values():
        seen = {media for _, media in attention.setting(shape, CPU).segments() if media is not None}
        last = {shape.media - 1}
        assert seen == (last if shape.tokens == 1 else set(range(shape.rows * shape.media)))
