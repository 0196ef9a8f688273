"""The providers under pytest-benchmark, small shapes only: `pytest benchmarks/`. Right results alone are timed."""

import functools
from types import ModuleType

import pytest
import torch

from benchmarks import bench_gated_block, bench_masked_cross_attention, bench_resampler, bench_training
from benchmarks.harness import FORWARD, TRAINING, Case, ErrorBudget, Unavailable, results, timed_call

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEASURED = [
    (bench_masked_cross_attention, "mini", FORWARD),
    (bench_masked_cross_attention, "mini", TRAINING),
    (bench_masked_cross_attention, "decode32", FORWARD),
    (bench_gated_block, "decode32", FORWARD),
    (bench_resampler, "image", FORWARD),
    (bench_training, "tiny-layers", TRAINING),
    (bench_training, "tiny-step", TRAINING),
]
RUNS = [
    pytest.param(*run, provider, id=f"{run[0].OP}-{run[1]}-{run[2]}-{provider.name}")
    for run in MEASURED
    for provider in run[0].PROVIDERS
]


@functools.cache
def case_and_budget(bench: ModuleType, shape: str, pass_: str) -> tuple[Case, ErrorBudget]:
    case = bench.case(bench.MEASURED[shape], torch.float32, DEVICE)
    return case, ErrorBudget(case, bench.PROVIDERS[0], pass_)


@pytest.mark.parametrize(("bench", "shape", "pass_", "provider"), RUNS)
def test_provider(benchmark, bench: ModuleType, shape: str, pass_: str, provider) -> None:
    torch.compiler.reset()
    case, budget = case_and_budget(bench, shape, pass_)
    try:
        prepared = provider.prepare(case)
    except Unavailable as reason:
        pytest.skip(f"{provider.name}: {reason}")
    if pass_ == TRAINING and prepared.no_backward:
        pytest.skip(prepared.no_backward)
    assert budget.spent(results(prepared, pass_)) <= 1
    call = timed_call(prepared, pass_)

    def measured() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{bench.OP} {shape} fp32 {pass_}"
    benchmark.pedantic(measured, rounds=15, warmup_rounds=2)
