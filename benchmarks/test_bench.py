"""The providers under pytest-benchmark, small shapes only: `pytest benchmarks/`. Right results alone are timed."""

import functools

import pytest
import torch

from benchmarks import bench_masked_cross_attention as bench
from benchmarks.harness import FORWARD, TRAINING, Case, ErrorBudget, Unavailable, results, timed_call
from benchmarks.shapes import SHAPES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def case_and_budget(shape: str, pass_: str) -> tuple[Case, ErrorBudget]:
    case = bench.case(SHAPES[shape], torch.float32, DEVICE)
    return case, ErrorBudget(case, bench.PROVIDERS[0], pass_)


@pytest.mark.parametrize("provider", bench.PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize(("shape", "pass_"), [("mini", FORWARD), ("mini", TRAINING), ("decode32", FORWARD)])
def test_masked_cross_attention(benchmark, provider, shape: str, pass_: str) -> None:
    torch.compiler.reset()
    case, budget = case_and_budget(shape, pass_)
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
