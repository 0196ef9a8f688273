"""Inputs of gated_cross_attention and of gated_block from a seed, runs, and the comparison with eager code in fp64."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flamingo_kernels.ops.gated_block import gated_block
from flamingo_kernels.ops.gated_cross_attention import gated_cross_attention
from tests.support import attention_cases, eager_linear
from tests.support.budget import assert_within_budget
from tests.support.dense_attention import attention

NAMES = ("x", "norm_weight", "norm_bias", "w_q", "k", "v", "w_out", "gate")
MLP_NAMES = {  # of gated_mlp's arguments among those of both
    **{name: f"ff_{name}" for name in ("norm_weight", "norm_bias", "gate")},
    "w_in": "w_in",
    "w_out": "w_back",
}
GATES = {None: None, "scalar": (), "one": (1,), "vector": ("C",)}


class GatedInputs(NamedTuple):
    """The op's tensors by name, None where there is none; its intervals; dy."""

    tensors: dict[str, Tensor | None]
    intervals: tuple[Tensor, Tensor]
    dy: Tensor


@dataclass(frozen=True)
class GatedCase:
    """dtype: of the weights. streams: of everything else, None for dtype. kind: which intervals.

    F: of the feed-forward behind it, with which it is a case of gated_block; 0 for none.
    """

    dtype: torch.dtype = torch.float32
    streams: torch.dtype | None = None
    kind: str = "latest"
    B: int = 2
    beams: int = 1
    T: int = 33
    C: int = 40
    H: int = 4
    G: int = 2
    D: int = 16
    M: int = 3
    L: int = 8
    norm: str = "layer"
    affine: int = 2
    gate: str | None = "scalar"
    F: int = 0
    activation: str = "squared_relu"
    seed: int = 0

    def __str__(self) -> str:
        default = GatedCase()
        changed = [f"{name}{value}" for name, value in vars(self).items() if value != getattr(default, name)]
        return "-".join(changed).replace("torch.", "").replace("dtype", "") or "float32"

    def inputs(self, device: str) -> GatedInputs:
        generator = torch.Generator().manual_seed(self.seed)
        streams = self.streams or self.dtype

        def normal(*shape: int, dtype: torch.dtype = streams, scale: float = 1.0, mean: float = 0.0) -> Tensor:
            return (mean + scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)

        inner, keys = self.H * self.D, self.M * self.L
        gate = None if self.gate is None else [self.C if n == "C" else n for n in GATES[self.gate]]
        tensors = {
            "x": normal(self.B, self.T, self.C),
            "norm_weight": normal(self.C, scale=0.3, mean=1.0) if self.affine else None,
            "norm_bias": normal(self.C, scale=0.7) if self.affine > 1 and self.norm == "layer" else None,
            "w_q": normal(inner, self.C, dtype=self.dtype, scale=self.C**-0.5),
            "k": normal(self.B // self.beams, keys, self.G, self.D, dtype=self.dtype),
            "v": normal(self.B // self.beams, keys, self.G, self.D, dtype=self.dtype),
            "w_out": normal(self.C, inner, dtype=self.dtype, scale=inner**-0.5),
            "gate": None if gate is None else normal(*gate, scale=0.7),
        }
        if self.F:
            tensors |= {
                f"ff_{name}": None if tensors[name] is None else normal(*tensors[name].shape, scale=0.5, mean=mean)
                for name, mean in (("norm_weight", 1.0), ("norm_bias", 0.0), ("gate", 0.0))
            }
            rows = 2 * self.F if self.activation == "swiglu" else self.F
            tensors["w_in"] = normal(rows, self.C, dtype=self.dtype, scale=self.C**-0.5)
            tensors["w_back"] = normal(self.C, self.F, dtype=self.dtype, scale=self.F**-0.5)
        intervals = attention_cases.intervals(self.kind, self.B, self.T, self.M, self.L, generator)
        return GatedInputs(tensors, tuple(x.to(device) for x in intervals), normal(self.B, self.T, self.C))

    def apply(self, inputs: GatedInputs, tensors: dict[str, Tensor | None]) -> Tensor:
        """The op on the backend in force."""
        attention = {name: tensors[name] for name in NAMES[1:]} | {"intervals": inputs.intervals, "norm": self.norm}
        if not self.F:
            return gated_cross_attention(tensors["x"], **attention)
        mlp = {name: tensors[ours] for name, ours in MLP_NAMES.items()}
        options = {"activation": self.activation, "norm": self.norm, "eps": 1e-5}
        return gated_block(tensors["x"], attention | {"eps": 1e-5}, mlp | options)

    def eager(self, inputs: GatedInputs, tensors: dict[str, Tensor | None]) -> Tensor:
        """The same in torch.nn.functional and with a dense mask."""
        x, norm_weight, norm_bias, w_q, k, v, w_out, gate = (tensors[name] for name in NAMES)
        q = eager_linear.norm_linear(x, norm_weight, norm_bias, w_q, norm=self.norm, eps=1e-5)
        q = q.unflatten(-1, (self.H, self.D))
        o, _ = attention(q, k, v, *inputs.intervals, self.D**-0.5)
        y = eager_linear.linear_gate_residual(o.flatten(2), w_out, x, gate)
        if not self.F:
            return y
        mlp = {name: tensors[ours] for name, ours in MLP_NAMES.items()}
        options = {"activation": self.activation, "norm": self.norm, "eps": 1e-5, "recompute": False}
        return eager_linear.gated_mlp(y, **mlp, **options)


def run(case: GatedCase, inputs: GatedInputs, of: str = "apply", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """y and each gradient by name, of the op or of its eager form, in `dtype` unless that of the inputs."""
    leaves = {
        name: None if x is None else x.to(dtype or x.dtype).detach().requires_grad_()
        for name, x in inputs.tensors.items()
    }
    y = getattr(case, of)(inputs, leaves)
    given = {name: x for name, x in leaves.items() if x is not None}
    gradients = torch.autograd.grad(y, list(given.values()), inputs.dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(given, gradients, strict=True))}


def check(case: GatedCase, device: str) -> None:
    """Run a case; y and every gradient keep the error budget, joined over seeds where they are small."""
    runs = []
    for seed in range(8):
        inputs = GatedCase(**{**vars(case), "seed": case.seed + 1000 * seed}).inputs(device)
        runs.append(
            (run(case, inputs), run(case, inputs, "eager", torch.float64), run(case, inputs, "eager"), inputs.tensors)
        )
    actual, exact, eager, tensors = zip(*runs, strict=True)
    for name in exact[0]:
        for results, given in zip(actual, tensors, strict=True):
            assert results[name].dtype == given["x" if name == "y" else name].dtype, name
            assert results[name].is_contiguous(), name
        joined = [torch.cat([each[name].flatten() for each in results]) for results in (actual, exact, eager)]
        assert_within_budget(name, joined[0], joined[1], joined[2:])
