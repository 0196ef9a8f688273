"""Runs the providers of one case: correctness first, then time in interleaved rounds, then memory.

A case is an op at one shape and dtype. A provider is one way to compute it: ours or a rival. All providers of a case
run in this process on the same values. A round runs each of them once, in an order that rotates from round to round, so
that drift of the machine falls on all alike and ratios of medians are fair. A wrong result gets no time.

Some CPUs multiply 16-bit dtypes hundreds of times slower than fp32. A provider whose calls are long takes part in fewer
rounds. A case may bring a small one along, with the same weights for fewer tokens: where the plain provider would take
too long at full size, correctness is shown on the small one, which the note says, and who would take too long is not
timed but gets a row with the time that a call would take.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

import flamingo_kernels as fk
from benchmarks.graphs import device_ms
from benchmarks.machine import Limits
from benchmarks.memory import peak_bytes, saved_bytes

FORWARD, TRAINING = "forward", "forward+backward"
_FACTOR = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 16, torch.float64: 64}  # c of the error budget
_SAMPLE_S = 1e-3  # calls shorter than this are timed several at once
_MIN_ROUNDS, _MAX_ROUNDS = 7, 60
_LONG_S = 1.0  # the first call of this length is no warm-up but a sample
_MOST_S = 9.0  # of the rounds of one provider, unless a single one takes longer
_LONGEST_S = 15.0  # a call in a 16-bit dtype that would take longer is not timed


class Unavailable(Exception):
    """A provider cannot run here; the message says why."""


@dataclass
class Work:
    """What one pass cannot do without: floating point operations and bytes read and written."""

    flops: float
    bytes: float


@dataclass
class Case:
    """An op at one shape and dtype. `setting` holds what providers need besides tensors that take a gradient."""

    op: str
    shape: str
    description: str
    inputs: dict[str, Tensor]
    grad_out: Tensor
    work: dict[str, Work]  # by pass; FORWARD alone where nobody trains
    setting: object
    small: "Case | None" = None  # the same weights for fewer tokens
    kind: Callable[[str], str] = str  # of inputs of one kind, by name, the gradients are judged as one tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.grad_out.dtype

    @property
    def device(self) -> torch.device:
        return self.grad_out.device

    def to(self, dtype: torch.dtype) -> "Case":
        inputs = {name: x.to(dtype) for name, x in self.inputs.items()}
        return replace(self, inputs=inputs, grad_out=self.grad_out.to(dtype))


@dataclass
class Prepared:
    """A provider bound to a case. Everything here is made outside the timing."""

    run: Callable[..., Tensor]  # leaves -> output
    leaves: Sequence[Tensor]  # in the order of the case's inputs, in the provider's layout
    grad_out: Tensor
    to_common: Callable[[Tensor], Tensor] = lambda x: x  # outputs and gradients, back to the case's layout
    setup: Callable[[], object] | None = None  # work done once per batch, such as building a mask; timed apart
    no_backward: str = ""  # why it cannot train
    constants: Sequence[Tensor] = ()  # what run reads besides the leaves, such as frozen weights
    note: str = ""  # the layout it was given, the backend


@dataclass
class Provider:
    """One way to compute a case. `prepare` raises Unavailable where it cannot run."""

    name: str
    prepare: Callable[[Case], Prepared]
    ours: bool = False
    compiles: bool = False  # torch.compile takes a while before the first call


def compiled(prepare: Callable[[Case], Prepared]) -> Callable[[Case], Prepared]:
    """The same with torch.compile around what runs."""

    def prepare_compiled(case: Case) -> Prepared:
        prepared = prepare(case)
        prepared.run = torch.compile(prepared.run, dynamic=False)
        return prepared

    return prepare_compiled


def on_backend(name: str, prepare: Callable[[Case], Prepared]) -> Callable[[Case], Prepared]:
    """Ours on a GPU backend that is not the one chosen by itself."""

    def prepare_on_backend(case: Case) -> Prepared:
        if case.device.type != "cuda":
            raise Unavailable("not on this device")
        if fk.backends()[name] != "available":
            raise Unavailable(fk.backends()[name])
        with fk.use_backend(name):
            prepared = prepare(case)
        run = prepared.run

        def run_on_backend(*leaves: Tensor) -> Tensor:
            with fk.use_backend(name):
                return run(*leaves)

        return replace(prepared, run=run_on_backend)

    return prepare_on_backend


@dataclass
class Row:
    """One provider, one pass. Times are milliseconds per call, None unless status is "ok"."""

    op: str
    shape: str
    description: str
    dtype: str
    provider: str
    ours: bool
    pass_: str
    status: str  # "ok" | "WRONG" | "slow" | "unavailable" | "failed"
    reason: str = ""
    note: str = ""
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    rounds: int = 0
    calls_per_sample: int = 1
    device_ms: float | None = None  # on a GPU: without the host, as benchmarks/graphs.py measures it
    setup_ms: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None  # kept for backward, the inputs apart
    saved_input_bytes: int | None = None
    error_over_budget: float | None = None  # at most 1 is right
    limit: str = ""  # which limit of the machine is the nearer one
    limit_fraction: float | None = None


@dataclass
class _Candidate:
    provider: Provider
    prepared: Prepared
    row: Row
    call: Callable[[], object]
    samples: list[float] = field(default_factory=list)
    rounds: int = 0


def run_case(
    case: Case, providers: Sequence[Provider], limits: Limits, seconds: float, progress: Callable[[str], None]
) -> list[Row]:
    """The rows of a case, one per provider and pass. `seconds` bounds the timed rounds of each pass.

    The first provider is the plain one: in fp64 it is the reference, in the case's dtype its error sets the budget.
    """
    rows, prepared = [], {}
    for provider in providers:
        try:
            prepared[provider.name] = provider.prepare(case)
        except Unavailable as error:
            rows += [_row(case, provider, p, "unavailable", str(error)) for p in case.work]
        except Exception as error:
            rows += [_row(case, provider, p, "failed", _first_line(error)) for p in case.work]
    if providers[0].name not in prepared:
        reason = f"{providers[0].name}, which shows who is right, is missing"
        rows += [
            _row(case, p, pass_, "unavailable", reason) for p in providers if p.name in prepared for pass_ in case.work
        ]
        return _in_order(rows, case, providers)
    for pass_ in case.work:
        rows += _run_pass(
            case,
            pass_,
            [(p, prepared[p.name]) for p in providers if p.name in prepared],
            limits,
            seconds,
            providers[0],
            progress,
        )
    return _in_order(rows, case, providers)


def _in_order(rows: list[Row], case: Case, providers: Sequence[Provider]) -> list[Row]:
    order = {provider.name: i for i, provider in enumerate(providers)}
    return sorted(rows, key=lambda row: (list(case.work).index(row.pass_), order[row.provider]))


def _run_pass(case, pass_, prepared, limits, seconds, plain, progress) -> list[Row]:
    checked, budget = _check(case, plain, pass_)
    times_smaller = case.work[pass_].flops / checked.work[pass_].flops
    rows, candidates = [], []
    for provider, bound in prepared:
        progress(f"{case.shape} {_dtype_name(case.dtype)} {pass_}: {provider.name}")
        row = _row(case, provider, pass_, "ok")
        row.note = bound.note if checked is case else f"{bound.note}; checked on {checked.description}".lstrip("; ")
        rows.append(row)
        if pass_ == TRAINING and bound.no_backward:
            row.status, row.reason = "unavailable", bound.no_backward
            continue
        try:
            small = bound if checked is case else provider.prepare(checked)
            row.error_over_budget = budget.spent(results(small, pass_))
        except Exception as error:  # a rival that cannot run is a row, not the end of the benchmark
            row.status, row.reason = "failed", _first_line(error)
            continue
        if not row.error_over_budget <= 1:
            row.status = "WRONG"
            row.reason = f"error is {row.error_over_budget:.3g} times the budget"
            continue
        if checked is not case:
            expected = times_smaller * _sample(timed_call(small, pass_), 1, case.device)
            if expected > _LONGEST_S:
                row.status, row.reason = "slow", f"some {expected:.0f} s a call, going by {checked.description}"
                continue
        candidates.append(_Candidate(provider, bound, row, timed_call(bound, pass_)))
    progress(f"{case.shape} {_dtype_name(case.dtype)} {pass_}: timing")
    _time(candidates, case.device, seconds)
    if case.device.type == "cuda":
        for c, ms in zip(candidates, device_ms([c.call for c in candidates]), strict=True):
            c.row.device_ms = ms
    for c in candidates:
        row = c.row
        row.p20_ms, row.p50_ms, row.p80_ms = percentiles([1e3 * s for s in c.samples])
        row.rounds = len(c.samples)
        row.limit, limit_ms = limits.nearer(case.work[pass_], case.dtype)
        row.limit_fraction = limit_ms / row.p50_ms
        row.peak_bytes = peak_bytes(c.call, case.device)
        if pass_ == TRAINING:
            row.saved_bytes, row.saved_input_bytes = saved_bytes(
                c.prepared.run, _leaves(c.prepared), c.prepared.constants
            )
        if c.prepared.setup is not None:
            row.setup_ms = _setup_ms(c.prepared.setup, case.device)
    return rows


def _check(case: Case, plain: Provider, pass_: str) -> tuple[Case, "ErrorBudget"]:
    """The case that shows who is right: the case itself, or its small one where the plain provider takes too long."""
    if case.small is None or case.dtype.itemsize > 2:
        return case, ErrorBudget(case, plain, pass_)
    budget = ErrorBudget(case.small, plain, pass_)
    if budget.plain_seconds * case.work[pass_].flops / case.small.work[pass_].flops > _LONGEST_S:
        return case.small, budget
    return case, ErrorBudget(case, plain, pass_)


def results(bound: Prepared, pass_: str) -> list[Tensor]:
    """The output and, in training, the gradient of every leaf, in the case's layout and in fp64."""
    if pass_ == FORWARD:
        with torch.no_grad():
            tensors = [bound.run(*bound.leaves)]
    else:
        leaves = _leaves(bound)
        output = bound.run(*leaves)
        tensors = [output, *torch.autograd.grad(output, leaves, bound.grad_out)]
    return [bound.to_common(x.detach()).double() for x in tensors]


def timed_call(bound: Prepared, pass_: str) -> Callable[[], object]:
    """What is timed: run under no_grad, or run and the gradients of all leaves."""
    if pass_ == FORWARD:

        @torch.no_grad()
        def call() -> object:
            return bound.run(*bound.leaves)

        return call
    leaves = _leaves(bound)
    return lambda: torch.autograd.grad(bound.run(*leaves), leaves, bound.grad_out)


def _leaves(bound: Prepared) -> list[Tensor]:
    """The leaves as autograd wants them; a module's own parameters stay themselves."""
    return [x if x.requires_grad else x.detach().requires_grad_() for x in bound.leaves]


class ErrorBudget:
    """err <= 2 · err(plain, same dtype) + c · eps(dtype) · max|reference|, for the output and each gradient.

    Of a few numbers the plain error may be small by chance, hence the case's `kind`.
    """

    def __init__(self, case: Case, plain: Provider, pass_: str) -> None:
        kinds = ["output"] if pass_ == FORWARD else ["output", *map(case.kind, case.inputs)]
        self._places = [[i for i, k in enumerate(kinds) if k == kind] for kind in dict.fromkeys(kinds)]
        self.reference = self._joined(results(plain.prepare(case.to(torch.float64)), pass_))
        bound, start = plain.prepare(case), time.perf_counter()
        plain_results = results(bound, pass_)
        self.plain_seconds = time.perf_counter() - start
        plain_errors = map(_error, self._joined(plain_results), self.reference)
        rounding = _FACTOR[case.dtype] * torch.finfo(case.dtype).eps
        self.allowed = [
            2 * error + rounding * float(ref.abs().max())
            for error, ref in zip(plain_errors, self.reference, strict=True)
        ]

    def spent(self, tensors: list[Tensor]) -> float:
        """The largest error as a fraction of its budget; inf where a value is not finite or a shape is wrong."""
        return max(
            _error(x, ref) / allowed if allowed > 0 else float(_error(x, ref) > 0) * math.inf
            for x, ref, allowed in zip(self._joined(tensors), self.reference, self.allowed, strict=True)
        )

    def _joined(self, tensors: list[Tensor]) -> list[Tensor]:
        parts = ([tensors[i] for i in places] for places in self._places)
        return [part[0] if len(part) == 1 else torch.cat([x.flatten() for x in part]) for part in parts]


def _error(x: Tensor, reference: Tensor) -> float:
    if x.shape != reference.shape or not bool(x.isfinite().all()):
        return math.inf
    return float((x - reference).abs().max())


def _time(candidates: list[_Candidate], device: torch.device, seconds: float) -> None:
    """Fill the samples, in seconds per call."""
    if not candidates:
        return
    first = [_first_s(c, device) for c in candidates]
    round_s = sum(first_s * c.row.calls_per_sample for c, first_s in zip(candidates, first, strict=True))
    rounds = min(max(round(seconds / round_s), _MIN_ROUNDS), _MAX_ROUNDS)
    for c, first_s in zip(candidates, first, strict=True):
        c.rounds = min(rounds, max(1, int(_MOST_S / (first_s * c.row.calls_per_sample))))
    for turn in range(rounds):
        shift = turn % len(candidates)
        for c in candidates[shift:] + candidates[:shift]:
            if len(c.samples) < c.rounds:
                c.samples.append(_sample(c.call, c.row.calls_per_sample, device))


def _first_s(candidate: _Candidate, device: torch.device) -> float:
    """Seconds per call of the first sample; fixes how many calls make one."""
    first = _sample(candidate.call, 1, device)
    if first > _LONG_S:
        candidate.samples.append(first)
        return first
    first = min(_sample(candidate.call, 1, device) for _ in range(2))
    candidate.row.calls_per_sample = max(1, math.ceil(_SAMPLE_S / first))
    return _sample(candidate.call, candidate.row.calls_per_sample, device)


def _sample(call: Callable[[], object], calls: int, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / calls


def _setup_ms(setup: Callable[[], object], device: torch.device) -> float:
    return percentiles([1e3 * _sample(setup, 1, device) for _ in range(6)][1:])[1]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    low, middle, high = np.percentile(samples, (20, 50, 80))
    return float(low), float(middle), float(high)


def _row(case: Case, provider: Provider, pass_: str, status: str, reason: str = "") -> Row:
    return Row(
        case.op, case.shape, case.description, _dtype_name(case.dtype), provider.name, provider.ours, pass_,
        status, reason,
    )  # fmt: skip


def _dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
