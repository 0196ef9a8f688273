"""The rivals of whole modules compute what fk.nn computes, and the work counted is what the docstrings say."""

from types import ModuleType

import pytest
import torch

import flamingo_kernels as fk
from benchmarks import bench_gated_block as block
from benchmarks import bench_masked_cross_attention as attention
from benchmarks import bench_resampler as resampler
from benchmarks.harness import FORWARD, TRAINING, Case, ErrorBudget, Unavailable, results
from benchmarks.shapes import LATENTS, SHAPES, ResamplerShape, Shape

CPU = torch.device("cpu")
TRAINED = Shape("trained", 3, 11, 3, 2, 16, 24, 40)
SAME_WIDTHS = Shape("same widths", 2, 7, 2, 2, 16, 40, 40)  # flamingo-pytorch has one width
SWIGLU = Shape("swiglu", 3, 11, 3, 2, 16, 24, 40, ff_width=56, activation="swiglu")
DECODED = Shape("decoded", 3, 1, 3, 2, 16, 24, 40, beams=3, trains=False)
IMAGES = ResamplerShape("images", 3, 9, 24, 2, 16, depth=2)
RAGGED = ResamplerShape("ragged", 3, 9, 24, 2, 16, lengths=(9, 4, 1), depth=2)
MEASURED = [(block, shape) for shape in (TRAINED, SAME_WIDTHS, SWIGLU, DECODED)]
MEASURED += [(resampler, shape) for shape in (IMAGES, RAGGED)]
each_shape = pytest.mark.parametrize(("module", "shape"), MEASURED, ids=lambda x: getattr(x, "name", ""))


@each_shape
def test_the_fp64_reference_is_the_module(module: ModuleType, shape) -> None:
    case = module.case(shape, torch.float64, CPU)
    plain = module.PROVIDERS[0]
    for pass_ in case.work:
        budget = ErrorBudget(case, plain, pass_)
        with fk.use_backend("reference"):
            assert budget.spent(results(module.ours(case), pass_)) <= 1


@each_shape
def test_ours_is_right(backend, module: ModuleType, shape) -> None:
    case = module.case(shape, torch.float32, torch.device(backend.device))
    check(case, module.ours(case), module.PROVIDERS[0])


# torch.compile takes long; benchmarks/test_bench.py runs it behind the same check.
@each_shape
@pytest.mark.parametrize("name", sorted({p.name for m in (block, resampler) for p in m.PROVIDERS if not p.compiles}))
def test_rivals_are_right(name: str, module: ModuleType, shape) -> None:
    case = module.case(shape, torch.float32, CPU)
    for provider in module.PROVIDERS:
        if provider.name == name:
            try:
                prepared = provider.prepare(case)
            except Unavailable as reason:
                pytest.skip(f"{name}: {reason}")
            check(case, prepared, module.PROVIDERS[0])


def check(case: Case, prepared, plain) -> None:
    for pass_ in case.work:
        assert ErrorBudget(case, plain, pass_).spent(results(prepared, pass_)) <= 1


@pytest.mark.parametrize(
    ("module", "shape", "names"),
    [
        pytest.param(block, SAME_WIDTHS, [], id="every package takes one width"),
        pytest.param(block, TRAINED, ["flamingo-pytorch"], id="flamingo-pytorch has one width"),
        pytest.param(block, SWIGLU, ["flamingo-pytorch", "open-flamingo"], id="packages have gelu alone"),
        pytest.param(resampler, RAGGED, ["flamingo-pytorch", "open-flamingo"], id="packages take no mask"),
    ],
)
def test_who_cannot_run_says_so(module: ModuleType, shape, names: list[str]) -> None:
    pytest.importorskip("flamingo_pytorch", reason="flamingo-pytorch is not installed")
    pytest.importorskip("einops_exts", reason="the public Flamingo packages need einops-exts (extra: bench)")
    case, missing = module.case(shape, torch.float32, CPU), []
    for provider in module.PROVIDERS:
        if provider.ours:
            continue
        try:
            provider.prepare(case)
        except Unavailable:
            missing.append(provider.name)
    assert sorted(name for name in missing if not name.startswith("torch.compile")) == names


def test_every_gradient_says_something() -> None:
    """No gradient vanishes, least of all those of the gates."""
    for module, shape in MEASURED:
        case = module.case(shape, torch.float32, CPU)
        if TRAINING in case.work:
            for name, gradient in zip(case.inputs, results(module.eager(case), TRAINING)[1:], strict=True):
                assert gradient.norm() > 1e-3, f"{shape.name}: {name}"


@pytest.mark.parametrize(("module", "shape"), [(block, TRAINED), (resampler, IMAGES), (resampler, RAGGED)])
def test_the_small_case_has_the_same_weights(module: ModuleType, shape) -> None:
    case = module.case(shape, torch.float32, CPU)
    activations = {"x", "media"}
    assert {name for name, x in case.inputs.items() if x is not case.small.inputs[name]} <= activations
    assert case.small.small is None
    for shape in module.MEASURED.values():
        assert module._small(shape)._replace(name="") != shape


def test_work_of_a_block() -> None:
    case = block.case(TRAINED, torch.bfloat16, CPU)
    text, keys, inner, C, V = 3 * 11, 3 * 3 * LATENTS, 32, 24, 40
    inside = attention.work(attention.setting(TRAINED, CPU), torch.bfloat16)
    matmuls = 2 * (text * (2 * C * inner + 2 * 4 * C * C) + keys * V * 2 * inner)
    assert case.work[FORWARD].flops == matmuls + inside[FORWARD].flops
    assert case.work[TRAINING].flops == 3 * matmuls + inside[TRAINING].flops
    weights = 4 * C + 2 + 2 * C * inner + 2 * inner * V + 8 * C * C
    assert case.work[FORWARD].bytes == 2 * (2 * text * C + keys * V + weights)
    assert case.work[TRAINING].bytes == 3 * case.work[FORWARD].bytes
    swiglu = block.case(SWIGLU, torch.bfloat16, CPU).work[FORWARD].flops
    assert swiglu - case.work[FORWARD].flops == 2 * text * C * (3 * 56 - 8 * C)
    decoded = block.case(DECODED, torch.bfloat16, CPU).work
    assert list(decoded) == [FORWARD]
    inside = attention.work(attention.setting(DECODED, CPU), torch.bfloat16)[FORWARD]
    assert decoded[FORWARD].flops == 2 * 3 * (2 * C * inner + 8 * C * C) + inside.flops
    assert decoded[FORWARD].bytes == 2 * (2 * 3 * C + weights - 2 * inner * V) + inside.bytes


def test_work_of_a_resampler_counts_valid_tokens() -> None:
    V, inner, latents = 24, 32, 3 * LATENTS
    for shape, tokens in ((IMAGES, 27), (RAGGED, 14)):
        case = resampler.case(shape, torch.float32, CPU)
        linear = 2 * (latents * (2 * V * inner + 8 * V * V) + (latents + tokens) * V * 2 * inner)
        pairs = 4 * inner * LATENTS * (tokens + latents)
        assert case.work[FORWARD].flops == 2 * (linear + pairs)
        assert case.work[TRAINING].flops == 2 * (3 * linear + 3.5 * pairs)


def test_widths_of_the_feed_forward() -> None:
    widths = {name: (shape.F, shape.activation) for name, shape in SHAPES.items()}
    assert widths.pop("idefics9b") == (11008, "swiglu")
    assert widths == {name: (4 * SHAPES[name].width, "gelu") for name in widths}
