"""Ours and OpenFlamingo's modules make the same model of the same weights; what a step is told to gain is Amdahl's."""

import dataclasses

import pytest
import torch

import flamingo_kernels as fk
from benchmarks import bench_training as training
from benchmarks.harness import TRAINING, Case, ErrorBudget, Row, Unavailable, results, run_case
from benchmarks.machine import Limits
from benchmarks.memory import saved_bytes
from flamingo import FlamingoConfig
from flamingo.config import LanguageConfig
from flamingo.language import build_lm
from tests.nn.test_numerics import BLOCK_OPS, RESAMPLER_OPS

CPU = torch.device("cpu")
CONFIG = FlamingoConfig(
    every=2,
    offset=1,
    heads=2,
    dim_head=8,
    ff_mult=2,
    activation="gelu",
    resampler_depth=2,
    resampler_heads=2,
    resampler_dim_head=8,
    latents=4,
    max_frames=2,
    language=LanguageConfig("gpt_neox", 4, 32, 4, 128, 64),  # Llama's norm is in fp32 in an fp64 model too
)
LAYERS = training.TrainingShape("small-layers", CONFIG, 8, 35, 3, 9, 24, episodes=True, whole=False)
STEP = LAYERS._replace(name="small-step", whole=True)
PAGES = STEP._replace(name="small-pages", episodes=False)
each_shape = pytest.mark.parametrize("shape", [LAYERS, STEP, PAGES], ids=lambda shape: shape.name)


@pytest.fixture(autouse=True)
def open_flamingo() -> None:
    pytest.importorskip("einops_exts", reason="the public Flamingo packages need einops-exts (extra: bench)")
    try:
        training.packages.open_flamingo()
    except Unavailable as reason:
        pytest.skip(f"open-flamingo: {reason}")


def spent(case: Case, provider) -> float:
    return ErrorBudget(case, training.PROVIDERS[0], TRAINING).spent(results(provider(case), TRAINING))


@each_shape
def test_the_fp64_reference_is_the_module(shape: training.TrainingShape) -> None:
    with fk.use_backend("reference"):
        assert spent(training.case(shape, torch.float64, CPU), training.ours) <= 1


@BLOCK_OPS
@RESAMPLER_OPS
@pytest.mark.parametrize(
    ("shape", "dtype"),
    # a whole step this small is right in bf16 or not by chance; the benchmark checks those of its own size
    [(LAYERS, torch.bfloat16), *((shape, torch.float32) for shape in (LAYERS, STEP, PAGES))],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_ours_is_right(backend, shape: training.TrainingShape, dtype: torch.dtype) -> None:
    assert spent(training.case(shape, dtype, torch.device(backend.device)), training.ours) <= 1


# torch.compile takes long; benchmarks/test_bench.py runs it behind the same check.
@each_shape
def test_logits_everywhere_change_nothing(shape: training.TrainingShape) -> None:
    case = training.case(shape, torch.float32, CPU)
    if shape.whole:
        assert spent(case, training.open_flamingo_all_logits) <= 1
    else:
        with pytest.raises(Unavailable, match="no logits"):
            training.open_flamingo_all_logits(case)


@each_shape
def test_every_gradient_says_something(shape: training.TrainingShape) -> None:
    case = training.case(shape, torch.float32, CPU)
    unused = "resampler.frame_embeddings"  # the second of two: media are images
    for name, gradient in zip(case.inputs, results(training.open_flamingo(case), TRAINING)[1:], strict=True):
        smallest = gradient[0].norm() if name == unused else gradient.norm()
        assert smallest > 1e-6, name


@each_shape
def test_the_small_case_has_the_same_weights(shape: training.TrainingShape) -> None:
    case = training.case(shape, torch.float32, CPU)
    assert all(case.small.inputs[name] is x for name, x in case.inputs.items())
    if shape.whole:
        assert case.small.setting.original is case.setting.original
    assert case.small.setting.shape.rows < shape.rows


def test_losses_are_on_labels_or_on_all_text() -> None:
    labels = training.case(STEP, torch.float32, CPU).setting.batch.targets[0]
    text = training.case(PAGES, torch.float32, CPU).setting.batch.targets[0]
    images = [0, 12, 24]  # of 36 tokens, the last of which is a target alone
    assert labels.nonzero().flatten().tolist() == [13, 25]
    assert text.nonzero().flatten().tolist() == [t for t in range(36) if t not in images]


def test_work_counts_frozen_weights_once_in_backward() -> None:
    layers, step = (training.case(shape, torch.bfloat16, CPU) for shape in (LAYERS, STEP))
    C, V, F, text, latents, media = 32, 24, 64, 8 * 35, 8 * 3 * 4, 8 * 3 * 9
    blocks = 2 * (text * (2 * C * 16 + 2 * C * F) + latents * 2 * 16 * V)
    resampler = 2 * (latents * (2 * V * 16 + 8 * V * V) + (latents + media) * 2 * 16 * V)
    pairs = 2 * 16 * text * 4 + 2 * 16 * latents * (9 + 4)
    assert layers.work[TRAINING].flops == 6 * (blocks + resampler) + 14 * pairs
    new = sum(x.numel() for x in layers.inputs.values())
    assert layers.work[TRAINING].bytes == 3 * 4 * new
    frozen, head = 4 * (3 * C * C + C * C + 2 * C * 64), 128 * C
    assert step.work[TRAINING].flops - layers.work[TRAINING].flops == 4 * text * frozen + 4 * 8 * 2 * head
    assert step.work[TRAINING].bytes - layers.work[TRAINING].bytes == 2 * 2 * (frozen + head)


def test_frozen_weights_are_inputs_and_no_activations() -> None:
    case = training.case(STEP, torch.float32, CPU)
    prepared = training.ours(case)
    besides, of_inputs = saved_bytes(prepared.run, prepared.leaves, prepared.constants)
    with_frozen, of_leaves = saved_bytes(prepared.run, prepared.leaves)
    assert besides + of_inputs == with_frozen + of_leaves
    # at least what multiplies behind the first block
    frozen = sum(p.nbytes for p in case.setting.original.gpt_neox.layers[1:].parameters() if p.ndim == 2)
    assert frozen <= with_frozen - besides <= sum(x.nbytes for x in prepared.constants)


def test_models_are_those_that_are_meant() -> None:
    shape = training.MEASURED["smollm2-step"]
    with torch.device("meta"):
        lm = build_lm(shape.config.language)
    assert sum(p.numel() for p in lm.parameters()) == 134_515_008  # of SmolLM2-135M
    assert len(shape.config.block_layers(lm.config.num_hidden_layers)) == 10
    assert (shape.rows, shape.media, shape.tokens + 1) == (16, 8, 24)  # an image, a word and a newline, eight times
    assert set(training.QUICK) <= set(training.MEASURED)
    for name, shape in training.MEASURED.items():
        assert name == shape.name
        assert dataclasses.replace(shape.config, activation="squared_relu").activation != shape.config.activation


def test_a_missing_open_flamingo_leaves_rows_that_say_so(monkeypatch) -> None:
    def missing() -> None:
        raise Unavailable("not installed")

    monkeypatch.setattr(training.packages, "open_flamingo", missing)
    case = training.case(LAYERS, torch.float32, CPU)
    rows = run_case(case, training.PROVIDERS, Limits(CPU), seconds=0.0, progress=lambda text: None)
    assert [row.provider for row in rows] == [provider.name for provider in training.PROVIDERS]
    assert {row.status for row in rows} == {"unavailable"}
    assert "open-flamingo, which shows who is right, is missing" in {row.reason for row in rows}


def test_remarks_say_what_a_step_can_gain() -> None:
    def row(part: str, provider: str, ms: float, saved: int, status: str = "ok") -> Row:
        return Row("training", f"tiny-{part}", "", "fp32", provider, False, TRAINING, status, p50_ms=ms,
                   saved_bytes=saved, peak_bytes=saved)  # fmt: skip

    rows = [
        row("layers", "open-flamingo", 20.0, 100),
        row("layers", "flamingo_kernels", 10.0, 40),
        row("step", "open-flamingo", 80.0, 400),
        row("step", "flamingo_kernels", 64.0, 300),
    ]
    (line,) = training.remarks(rows)
    assert line == (
        "training tiny fp32: the added layers take 25% of open-flamingo's step, which could be 1.33x as fast if they "
        "took no time; ours is 1.25x, 32,000 tokens/s and not 25,600. It keeps 0.40x the bytes for backward in the "
        "added layers and 0.75x in the step, whose peak is 0.75x"
    )
    assert training.remarks([*rows[:3], row("step", "flamingo_kernels", 64.0, 300, status="WRONG")]) == []
