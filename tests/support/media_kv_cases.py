"""Inputs of media_kv from a seed, and the comparison with eager code: for each layer a LayerNorm and a linear map."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import flamingo_kernels as fk
from tests.support.budget import assert_within_budget

EPS = 1e-5


class MediaInputs(NamedTuple):
    """media [..., V]; for each layer a weight [2·G·D, V], a norm ([V], [V]) if there are any, dout [..., 2·G·D]."""

    media: Tensor
    weights: list[Tensor]
    norms: list[tuple[Tensor, Tensor]] | None
    dout: list[Tensor]
    heads: int

    def leaves(self) -> "MediaInputs":
        """The same with leaves that require gradients, in the same memory."""
        return self.map(lambda x: x.detach().requires_grad_())

    def map(self, of: Callable[[Tensor], Tensor]) -> "MediaInputs":
        """Another tensor for each of the op's own, dout as it is."""
        norms = self.norms and [(of(weight), of(bias)) for weight, bias in self.norms]
        return self._replace(media=of(self.media), weights=[of(x) for x in self.weights], norms=norms)

    def named(self) -> dict[str, Tensor]:
        """The op's own tensors."""
        named = {"media": self.media, **{f"weights[{i}]": x for i, x in enumerate(self.weights)}}
        for i, (weight, bias) in enumerate(self.norms or ()):
            named |= {f"norms[{i}].weight": weight, f"norms[{i}].bias": bias}
        return named


@dataclass(frozen=True)
class MediaCase:
    """dtype: of the weights. streams: of media and norms, None for dtype. dims: D of each layer. mean: of media."""

    dtype: torch.dtype = torch.float32
    streams: torch.dtype | None = None
    rows: tuple[int, ...] = (2, 33)
    V: int = 40
    G: int = 2
    dims: tuple[int, ...] = (16, 16, 16)
    norms: bool = True
    mean: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        default = MediaCase()
        changed = [f"{name}{value}" for name, value in vars(self).items() if value != getattr(default, name)]
        return "-".join(changed).replace("torch.", "").replace("dtype", "").replace(" ", "") or "float32"

    def inputs(self, device: str) -> MediaInputs:
        generator = torch.Generator().manual_seed(self.seed)
        streams = self.streams or self.dtype

        def normal(*shape: int, dtype: torch.dtype = streams, scale: float = 1.0, mean: float = 0.0) -> Tensor:
            return (mean + scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)

        widths = [2 * self.G * dim for dim in self.dims]
        scale = max(self.V, 1) ** -0.5
        norms = [(normal(self.V, scale=0.3, mean=1.0), normal(self.V, scale=0.7)) for _ in widths]
        return MediaInputs(
            normal(*self.rows, self.V, mean=self.mean),
            [normal(width, self.V, dtype=self.dtype, scale=scale) for width in widths],
            norms if self.norms else None,
            [normal(*self.rows, width, dtype=self.dtype) for width in widths],
            self.G,
        )


def apply(inputs: MediaInputs) -> list[Tensor]:
    """[k, v] of each layer as [..., 2·G·D], on the backend in force."""
    pairs = fk.media_kv(inputs.media, inputs.weights, inputs.heads, norms=inputs.norms, eps=EPS)
    return [torch.cat([x.flatten(-2) for x in pair], -1) for pair in pairs]


def run_op(inputs: MediaInputs) -> dict[str, Tensor]:
    """The outputs `out[i]`, and the gradient of each tensor under its name."""
    return _run(apply, inputs)


def assert_right(actual: dict[str, Tensor], inputs: MediaInputs) -> None:
    """Every result within the error budget of docs/design.md, section 5."""
    exact = _run(_eager, inputs.map(Tensor.double)._replace(dout=[x.double() for x in inputs.dout]))
    eager = [_run(_eager, inputs), _flipped(_run(_eager, _flip(inputs)), inputs)]
    like = inputs.named() | {f"out[{i}]": x for i, x in enumerate(inputs.dout)}
    for name, value in exact.items():
        assert actual[name].shape == like[name].shape, name
        assert actual[name].dtype == like[name].dtype, name
        assert_within_budget(name, actual[name], value, [each[name] for each in eager])


def assert_identical(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def _run(function: Callable[[MediaInputs], Sequence[Tensor]], inputs: MediaInputs) -> dict[str, Tensor]:
    leaves = inputs.leaves()
    named = leaves.named()
    out = function(leaves)
    gradients = torch.autograd.grad(out, list(named.values()), inputs.dout)
    return {f"out[{i}]": x.detach() for i, x in enumerate(out)} | dict(zip(named, gradients, strict=True))


def _eager(inputs: MediaInputs) -> list[Tensor]:
    """Matmuls in the dtype of the weights, norms in that of their parameters."""
    media, V = inputs.media, inputs.media.shape[-1:]

    def normalized(norm: tuple[Tensor, Tensor] | None) -> Tensor:
        return media if norm is None else F.layer_norm(media.to(norm[0].dtype), V, *norm, EPS)

    layers = zip(inputs.weights, inputs.norms or [None] * len(inputs.weights), strict=True)
    return [F.linear(normalized(norm).to(weight.dtype), weight) for weight, norm in layers]


def _flip(inputs: MediaInputs) -> MediaInputs:
    """Every sum the other way round: over V, over rows, over outputs, over layers."""
    turned = inputs.map(_turn)
    return turned._replace(
        weights=turned.weights[::-1],
        norms=turned.norms and turned.norms[::-1],
        dout=[_turn(x) for x in inputs.dout][::-1],
    )


def _flipped(results: dict[str, Tensor], inputs: MediaInputs) -> dict[str, Tensor]:
    """Results of flipped inputs in the order of the inputs."""
    last = len(inputs.weights) - 1
    turned = {}
    for name, x in results.items():
        head, bracket, tail = name.partition("[")
        if bracket:
            i, _, rest = tail.partition("]")
            name = f"{head}[{last - int(i)}]{rest}"
        turned[name] = _turn(x)
    return turned


def _turn(x: Tensor) -> Tensor:
    return x.flip(tuple(range(x.ndim)))


def saved_bytes(case: MediaCase) -> int:
    """The formula of the docstring."""
    streams = (case.streams or case.dtype).itemsize
    rows, layers = math.prod(case.rows), len(case.dims)
    weights = case.dtype.itemsize * sum(2 * case.G * dim * case.V for dim in case.dims)
    return streams * rows * case.V + weights + (streams * layers * 2 * case.V if case.norms else 0)
