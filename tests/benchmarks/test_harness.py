"""The benchmark harness: wrong results get no time, rivals that cannot run get a row, losses are shown."""

import math
import re
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import harness, report
from benchmarks.harness import (
    FORWARD,
    TRAINING,
    Case,
    Prepared,
    Provider,
    Row,
    Unavailable,
    Work,
    percentiles,
    run_case,
)
from benchmarks.machine import Limits

CPU = torch.device("cpu")


def exp_case(dtype: torch.dtype = torch.float32) -> Case:
    x = torch.linspace(-1, 1, 256).to(dtype)
    work = {FORWARD: Work(256, 2048), TRAINING: Work(512, 4096)}
    return Case("exp", "tiny", "tiny: 256 numbers", {"x": x}, torch.ones_like(x), work, None)


def provider(name: str, run, ours: bool = False, **prepared) -> Provider:
    def prepare(case: Case) -> Prepared:
        return Prepared(run, tuple(case.inputs.values()), case.grad_out, **prepared)

    return Provider(name, prepare, ours)


PLAIN = provider("plain", torch.exp)
OURS = provider("ours", lambda x: torch.exp(x / 2) ** 2, ours=True)


@pytest.fixture(scope="module")
def limits() -> Limits:
    limits = Limits(CPU)
    limits.matmul_flops = {torch.float32: 1e11, torch.bfloat16: 1e11}
    limits.bandwidth_bytes = {2**16: 1e10}
    return limits


def rows_of(*providers: Provider, limits: Limits, case: Case | None = None) -> dict[tuple[str, str], Row]:
    rows = run_case(case or exp_case(), providers, limits, seconds=0.0, progress=lambda text: None)
    return {(row.provider, row.pass_): row for row in rows}


def line_of(name: str, text: str) -> str:
    return next(line for line in text.splitlines() if name in line)


def test_right_providers_are_timed(limits: Limits) -> None:
    rows = rows_of(PLAIN, OURS, limits=limits)
    assert len(rows) == 4
    for row in rows.values():
        assert row.status == "ok"
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.error_over_budget <= 1
        assert row.rounds >= 7
    assert rows["ours", FORWARD].limit == "bandwidth"
    assert rows["ours", FORWARD].limit_fraction == pytest.approx(2048 / 1e10 * 1e3 / rows["ours", FORWARD].p50_ms)


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda x: torch.exp(x) * 1.001, id="off by a thousandth"),
        pytest.param(lambda x: torch.where(x > 0.99, math.nan, torch.exp(x)), id="a NaN"),
        pytest.param(lambda x: torch.exp(x)[:255], id="a wrong shape"),
    ],
)
def test_a_wrong_forward_gets_no_time(run, limits: Limits) -> None:
    case = replace(exp_case(), work={FORWARD: Work(256, 2048)})
    row = rows_of(PLAIN, provider("impostor", run), OURS, limits=limits, case=case)["impostor", FORWARD]
    assert row.status == "WRONG"
    assert row.p50_ms is None
    assert row.rounds == 0
    text = report.table([row, rows_of(PLAIN, OURS, limits=limits)["ours", FORWARD]])
    assert "WRONG: error is" in line_of("impostor", text)
    assert ".." not in line_of("impostor", text)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.exp(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def test_a_wrong_gradient_gets_no_training_time_but_keeps_its_forward(limits: Limits) -> None:
    rows = rows_of(PLAIN, provider("impostor", WrongGradient.apply), limits=limits)
    assert rows["impostor", FORWARD].status == "ok"
    assert rows["impostor", TRAINING].status == "WRONG"
    assert rows["impostor", TRAINING].p50_ms is None


def test_what_cannot_run_gets_a_row_with_the_reason(limits: Limits) -> None:
    def absent(case: Case) -> Prepared:
        raise Unavailable("not installed")

    def crash(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel for this\nsecond line")

    rows = rows_of(
        PLAIN,
        OURS,
        Provider("absent", absent),
        provider("crashing", crash),
        provider("inference only", torch.exp, no_backward="has no backward"),
        limits=limits,
    )
    assert (rows["absent", FORWARD].status, rows["absent", FORWARD].reason) == ("unavailable", "not installed")
    assert rows["crashing", FORWARD].status == "failed"
    assert rows["crashing", FORWARD].reason == "RuntimeError: no kernel for this"
    assert rows["inference only", FORWARD].status == "ok"
    assert rows["inference only", TRAINING].reason == "has no backward"
    text = report.table([row for (_, pass_), row in rows.items() if pass_ == TRAINING])
    assert "unavailable: has no backward" in line_of("inference only", text)


def test_without_the_plain_provider_nobody_is_timed(limits: Limits) -> None:
    def absent(case: Case) -> Prepared:
        raise Unavailable("not installed")

    rows = rows_of(Provider("plain", absent), OURS, limits=limits)
    assert len(rows) == 4
    assert {row.status for row in rows.values()} == {"unavailable"}
    assert rows["ours", TRAINING].reason == "plain, which shows who is right, is missing"


def test_gradients_of_one_kind_are_judged_together() -> None:
    """y = a + b + c: the plain gradient of b is right by chance, and so b's budget is that of a."""
    inputs = {name: torch.ones(1) for name in "abc"}
    case = Case(
        "sum",
        "tiny",
        "",
        inputs,
        torch.ones(1),
        {TRAINING: Work(1, 1)},
        None,
        kind={"a": "ab", "b": "ab", "c": "c"}.get,
    )

    def off_by(*errors: float) -> Provider:
        class Sum(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *xs: Tensor) -> Tensor:
                return sum(xs)

            @staticmethod
            def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
                exact = grad.dtype == torch.float64
                return tuple(grad * (1 if exact else 1 + error) for error in errors)

        return provider("sum", Sum.apply)

    budget = harness.ErrorBudget(case, off_by(1e-3, 0, 1e-3), TRAINING)
    assert budget.spent(harness.results(off_by(0, 1e-3, 0).prepare(case), TRAINING)) < 1
    assert budget.spent(harness.results(off_by(0, 3e-3, 0).prepare(case), TRAINING)) > 1
    apart = harness.ErrorBudget(replace(case, kind=str), off_by(1e-3, 0, 1e-3), TRAINING)
    assert apart.spent(harness.results(off_by(0, 1e-3, 0).prepare(case), TRAINING)) > 1


def test_rounds_are_interleaved_and_their_order_rotates(limits: Limits) -> None:
    calls: list[str] = []

    def slow(name: str):
        def run(x: Tensor) -> Tensor:
            calls.append(name)
            time.sleep(2e-3)  # longer than a sample has to be, so that one call is a sample
            return torch.exp(x)

        return run

    case = replace(exp_case(), work={FORWARD: Work(256, 2048)})
    rows = rows_of(*(provider(name, slow(name)) for name in "abc"), limits=limits, case=case)
    assert {(row.rounds, row.calls_per_sample) for row in rows.values()} == {(7, 1)}
    rounds = "".join(calls)[-3 - 3 * 7 : -3]  # before the three calls that measure memory
    assert rounds == "abcbcacababcbcacababc"


def test_long_calls_are_timed_less_often(limits: Limits, monkeypatch) -> None:
    monkeypatch.setattr(harness, "_LONG_S", 0.02)
    monkeypatch.setattr(harness, "_MOST_S", 0.09)
    rows = rows_of(*(sleeper(seconds) for seconds in (0.001, 0.03, 0.1)), limits=limits)
    assert [rows[f"{s} s", FORWARD].rounds for s in (0.001, 0.03, 0.1)] == [7, 2, 1]
    assert rows["0.1 s", FORWARD].p20_ms == rows["0.1 s", FORWARD].p80_ms >= 100


def sleeper(seconds: float) -> Provider:
    def run(x: Tensor) -> Tensor:
        time.sleep(seconds * x.numel() / 256)
        return torch.exp(x)

    return provider(f"{seconds} s", run)


def case_with_small() -> Case:
    case = exp_case(torch.bfloat16)
    small = replace(
        case,
        description="16 numbers",
        inputs={"x": case.inputs["x"][:16]},
        grad_out=case.grad_out[:16],
        work={FORWARD: Work(16, 128), TRAINING: Work(32, 256)},
    )
    return replace(case, small=small)


def test_what_would_take_too_long_is_checked_on_the_small_case_and_not_timed(limits: Limits, monkeypatch) -> None:
    monkeypatch.setattr(harness, "_LONGEST_S", 0.1)
    impostor = provider("impostor", lambda x: torch.exp(x) * 1.1)
    rows = rows_of(sleeper(0.4), OURS, impostor, limits=limits, case=case_with_small())
    slow, ours = rows["0.4 s", FORWARD], rows["ours", FORWARD]
    assert (slow.status, slow.p50_ms) == ("slow", None)
    assert re.fullmatch("some [0-9]+ s a call, going by 16 numbers", slow.reason)
    assert (ours.status, ours.note) == ("ok", "checked on 16 numbers")
    assert rows["impostor", FORWARD].status == "WRONG"
    (summary,) = report.summary([slow, ours])
    assert summary.endswith("ms, the rivals are too slow to time")


def test_what_is_quick_is_checked_at_full_size(limits: Limits) -> None:
    wrong_at_the_end = provider("impostor", lambda x: torch.where(torch.arange(x.numel()) > 20, 0, torch.exp(x)))
    rows = rows_of(PLAIN, OURS, wrong_at_the_end, limits=limits, case=case_with_small())
    assert rows["impostor", FORWARD].status == "WRONG"
    assert (rows["ours", FORWARD].status, rows["ours", FORWARD].note) == ("ok", "")


def test_percentiles() -> None:
    assert percentiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))


def test_the_setup_is_timed_apart(limits: Limits) -> None:
    made: list[int] = []
    rows = rows_of(PLAIN, provider("with mask", torch.exp, setup=lambda: made.append(1)), limits=limits)
    assert rows["with mask", FORWARD].setup_ms >= 0
    assert rows["plain", FORWARD].setup_ms is None
    assert made


def test_summary_names_the_best_rival_and_shows_losses(limits: Limits) -> None:
    ours = replace(rows_of(PLAIN, OURS, limits=limits)["ours", FORWARD], p50_ms=2.0)
    slow, fast = (replace(ours, provider=name, ours=False, p50_ms=ms) for name, ms in (("slow", 9.0), ("fast", 1.0)))
    wrong = replace(fast, provider="wrong", status="WRONG", p50_ms=None)
    assert report.summary([slow, ours, wrong, fast]) == ["exp tiny fp32: forward 0.50x the best rival (fast)"]
    assert report.summary([ours, wrong]) == ["exp tiny fp32: forward 2.000 ms, no rival runs"]
    assert report.summary([replace(ours, status="WRONG"), fast]) == ["exp tiny fp32: forward WRONG"]


def test_widening_to_fp32_sets_the_limit_of_narrow_dtypes() -> None:
    limits = Limits(CPU)
    limits.matmul_flops = {torch.float32: 1e20}
    assert limits.matmul(torch.bfloat16) == 1e20


def test_json_round_trip(tmp_path, limits: Limits) -> None:
    rows = list(rows_of(PLAIN, OURS, provider("impostor", torch.sin), limits=limits).values())
    path = tmp_path / "new" / "machine.json"
    report.save(path, {"name": "machine"}, limits.to_json(), rows)
    machine, measured, loaded = report.load(path)
    assert machine == {"name": "machine"}
    assert measured == {
        "matmul_gflops": {"float32": 100.0, "bfloat16": 100.0},
        "copy_gb_per_s_by_bytes_moved": {"65536": 10.0},
    }
    assert loaded == rows
