"""Cases of norm_linear, linear_gate_residual and gated_mlp: inputs from a seed, runs, and the comparison with fp64."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import flamingo_kernels as fk
from tests.support import eager_linear
from tests.support.budget import assert_within_budget

Tensors = dict[str, Tensor | None]
OPS = ("norm_linear", "linear_gate_residual", "gated_mlp")
ACTIVATIONS = ("squared_relu", "gelu", "gelu_tanh", "relu", "silu", "swiglu")
GATES = {None: None, "scalar": (), "one": (1,), "vector": ("C",)}
_DRAWS = 8


class Measures(NamedTuple):
    """y and every gradient, in fp64 and eagerly in the case's dtypes, one way round and the other; see the budget."""

    exact: Tensors
    eager: Tensors
    flipped: Tensors
    terms: Tensors


@dataclass(frozen=True)
class Case:
    """dtype: of the weights. streams: of everything else, None for dtype. rows: x's leading dimensions.

    C is the width of x, also for linear_gate_residual (K in its docstring). N is that of the first matmul's output: N,
    C or F of norm_linear, linear_gate_residual and gated_mlp. affine: how many parameters the norm has. mean: of x.
    """

    op: str
    dtype: torch.dtype = torch.float32
    streams: torch.dtype | None = None
    rows: tuple[int, ...] = (2, 33)
    C: int = 40
    N: int = 65
    norm: str = "layer"
    affine: int = 2
    gate: str | None = "vector"
    activation: str = "squared_relu"
    recompute: bool = False
    mean: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        default = Case(self.op)
        changed = [f"{name}{value}" for name, value in vars(self).items() if value != getattr(default, name)]
        return f"{self.op}-{'-'.join(changed)}".replace("torch.", "").replace("dtype", "").replace(" ", "")

    def options(self) -> dict[str, object]:
        """The keyword arguments of the op that are no tensors."""
        mlp = self.op == "gated_mlp"
        norm = {} if self.op == "linear_gate_residual" else {"norm": self.norm, "eps": 1e-5}
        return {
            **({"activation": self.activation} if mlp else {}),
            **norm,
            **({"recompute": self.recompute} if mlp else {}),
        }

    def inputs(self, device: str, seed: int | None = None) -> tuple[Tensors, Tensor]:
        """The op's tensors by name, and dy. Where the norm has no bias or there is no gate, the name has None."""
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        streams = self.streams or self.dtype

        def normal(*shape: int, dtype: torch.dtype = streams, scale: float = 1.0, mean: float = 0.0) -> Tensor:
            return (mean + scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)

        def weight(rows: int, columns: int) -> Tensor:
            return normal(rows, columns, dtype=self.dtype, scale=max(columns, 1) ** -0.5)

        tensors = {"x": normal(*self.rows, self.C, mean=self.mean)}
        width = self.C if self.op == "gated_mlp" else self.N
        if self.op != "linear_gate_residual":
            bias = self.affine > 1 and self.norm == "layer"
            tensors["norm_weight"] = normal(self.C, scale=0.3, mean=1.0) if self.affine else None
            tensors["norm_bias"] = normal(self.C, scale=0.7) if bias else None
        if self.op == "gated_mlp":
            tensors["w_in"] = weight(self.N * (2 if self.activation == "swiglu" else 1), self.C)
            tensors["w_out"] = weight(self.C, self.N)
        else:
            tensors["weight"] = weight(self.N, self.C)
        if self.op == "linear_gate_residual":
            tensors["residual"] = normal(*self.rows, self.N)
        if self.op != "norm_linear":
            shape = None if self.gate is None else [width if n == "C" else n for n in GATES[self.gate]]
            tensors["gate"] = None if shape is None else normal(*shape, scale=0.7)
        return tensors, normal(*self.rows, width, dtype=self.dtype if self.op == "norm_linear" else streams)

    def draws(self) -> int:
        """One number says little of how its computation errs, so where a result is small it is drawn several times."""
        smallest = math.prod(self.rows) * (self.C if self.op == "gated_mlp" else self.N)
        if self.op != "norm_linear" and self.gate is not None:
            smallest = min(smallest, 1 if self.gate != "vector" else self.N)
        return _DRAWS if min(smallest, self.N, self.C) < 32 else 1


def leaves_of(tensors: Tensors, wanted: Sequence[str] | None = None) -> Tensors:
    """Copies with the same strides that are leaves and require gradients: all of them, or the wanted ones."""
    return {
        name: None if x is None else x.detach().requires_grad_(wanted is None or name in wanted)
        for name, x in tensors.items()
    }


def apply(case: Case, tensors: Tensors) -> Tensor:
    """The op on the backend in force."""
    return getattr(fk, case.op)(**tensors, **case.options())


def run_op(case: Case, tensors: Tensors, dy: Tensor) -> dict[str, Tensor]:
    """y and the gradient of each tensor, under its name."""
    return _run(apply, case, tensors, dy)


def assert_right(case: Case, runs: Sequence[tuple[Tensors, Tensor, Tensors]]) -> None:
    """Results of the op, each with the inputs they came of, within the error budget of docs/design.md, section 5."""
    _compare([_measures(case, *inputs) for *inputs, _ in runs], runs)


def check(case: Case, device: str) -> None:
    """Run a case and compare."""
    drawn, measures = _drawn(case, device)
    _compare(measures, [(*inputs, run_op(case, *inputs)) for inputs in drawn])


@functools.cache  # every backend of a device is measured by the same numbers
def _drawn(case: Case, device: str) -> tuple[list[tuple[Tensors, Tensor]], list[Measures]]:
    drawn = [case.inputs(device, case.seed + 1000 * i) for i in range(case.draws())]
    return drawn, [_measures(case, *inputs) for inputs in drawn]


def _measures(case: Case, tensors: Tensors, dy: Tensor) -> Measures:
    runs = ((torch.float64, False), (None, False), (None, True))
    return Measures(*(_run_eager(case, tensors, dy, *run) for run in runs), _cancelling_terms(case, tensors, dy))


def _compare(measures: list[Measures], runs: Sequence[tuple[Tensors, Tensor, Tensors]]) -> None:
    for (tensors, dy, results), measure in zip(runs, measures, strict=True):
        for name, expected in measure.exact.items():
            assert results[name].shape == expected.shape, name
            assert results[name].dtype == (dy if name == "y" else tensors[name]).dtype, name
            assert name == "residual" or results[name].is_contiguous(), name  # that of the residual is dy itself

    def joined(name: str, results: list[Tensors]) -> Tensor:
        return torch.cat([each[name].flatten() for each in results])

    actual = [results for _, _, results in runs]
    exact, eager, flipped, terms = (list(each) for each in zip(*measures, strict=True))
    for name in exact[0]:
        measured = [joined(name, eager), joined(name, flipped)]
        cancelling = joined(name, terms) if name in terms[0] else None
        assert_within_budget(name, joined(name, actual), joined(name, exact), measured, terms=cancelling)


def _cancelling_terms(case: Case, tensors: Tensors, dy: Tensor) -> Tensors:
    """The sums of absolute values behind a dx of norm_linear, fp64: next to nothing is left of it where C is 1 or 2.

    dx' = rstd · (dx̂' + mean(dx̂') + |x̂| mean(dx̂' |x̂|)) with dx̂' = |dy| |weight| |norm_weight|
    """
    if case.op != "norm_linear":
        return {}
    x, weight, dy = (t.double() for t in (tensors["x"], tensors["weight"], dy))
    x = x - x.mean(-1, keepdim=True) if case.norm == "layer" else x
    rstd = (x.square().mean(-1, keepdim=True) + 1e-5) ** -0.5
    d, x_hat = dy.abs() @ weight.abs(), x.abs() * rstd
    d = d if tensors["norm_weight"] is None else d * tensors["norm_weight"].double().abs()
    return {"x": rstd * (d + d.mean(-1, keepdim=True) + x_hat * (d * x_hat).mean(-1, keepdim=True))}


def _run(function, case: Case, tensors: Tensors, dy: Tensor) -> dict[str, Tensor]:
    leaves = leaves_of(tensors)
    y = function(case, leaves)
    given = {name: x for name, x in leaves.items() if x is not None}
    return {"y": y.detach(), **dict(zip(given, torch.autograd.grad(y, list(given.values()), dy), strict=True))}


def _run_eager(case: Case, tensors: Tensors, dy: Tensor, dtype: torch.dtype | None, flip: bool) -> dict[str, Tensor]:
    """In `dtype`, None for that of the inputs; flip: every sum runs the other way round."""

    def eager(case: Case, leaves: Tensors) -> Tensor:
        return getattr(eager_linear, case.op)(**leaves, **case.options())

    def turn(name: str, x: Tensor) -> Tensor:
        if not flip:
            return x
        if name == "w_in" and case.activation == "swiglu":  # each half stays where it is
            return x.unflatten(0, (2, -1)).flip(1, 2).flatten(0, 1)
        return x.flip(tuple(range(x.ndim)))

    cast = {name: None if x is None else turn(name, x.to(dtype or x.dtype)) for name, x in tensors.items()}
    results = _run(eager, case, cast, turn("y", dy.to(dtype or dy.dtype)))
    return {name: turn(name, x) for name, x in results.items()}
