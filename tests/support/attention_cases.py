"""Inputs of masked_cross_attention: shapes, dtypes and intervals of every kind, from a seed."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import flamingo_kernels as fk
from tests.support.dense_attention import Inputs, Results

MODES = ("latest", "all", "next", "group")
KINDS = (*MODES, "full", "empty", "some_empty", "random", "one_key", "sliding", "touching", "overlapping", "backwards")


@dataclass(frozen=True)
class Case:
    """kind: which intervals. scale: softmax_scale, None for the default. Letters as in docs/design.md."""

    dtype: torch.dtype = torch.float32
    kind: str = "latest"
    B: int = 2
    beams: int = 1
    T: int = 65
    H: int = 2
    G: int = 2
    D: int = 64
    M: int = 3
    L: int = 16
    scale: float | None = None
    seed: int = 0

    def __str__(self) -> str:
        default = Case()
        changed = [f"{name}{value}" for name, value in vars(self).items() if value != getattr(default, name)]
        return "-".join(changed).replace("torch.", "").replace("dtype", "") or "float32"

    def inputs(self, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(self.seed)
        keys = self.M * self.L

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, self.dtype)

        start, end = intervals(self.kind, self.B, self.T, self.M, self.L, generator)
        return Inputs(
            normal(self.B, self.T, self.H, self.D),
            normal(self.B // self.beams, keys, self.G, self.D),
            normal(self.B // self.beams, keys, self.G, self.D),
            normal(self.B, self.T, self.H, self.D),
            start.to(device),
            end.to(device),
            self.D**-0.5 if self.scale is None else self.scale,
        )


def intervals(kind: str, B: int, T: int, M: int, L: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """start, end int32 [B, T] over M·L keys."""
    keys = M * L

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), (B, T), generator=generator)

    if kind in MODES:
        locations = torch.zeros(B, T, dtype=torch.bool)
        for row in locations:  # up to M media tokens a row, in pairs as often as not; the first tokens may see nothing
            wanted = int(torch.randint(0, min(M, T) + 1, (), generator=generator))
            row[torch.randperm(T, generator=generator)[:wanted]] = True
            if row[:-1].any() and row.sum() < M:
                row[int(row[:-1].nonzero()[0]) + 1] = True
        return fk.media_intervals(locations, L, M, attend=kind)
    position = torch.arange(T).expand(B, T)
    if kind == "full":
        start, end = torch.zeros(B, T), torch.full((B, T), keys)
    elif kind == "empty":  # written as start == end and as start > end
        start, end = integers(0, keys + 1), torch.zeros(B, T)
    elif kind == "some_empty":
        start, end = integers(0, keys + 1), integers(0, keys + 1)
    elif kind == "random":
        ends = torch.stack([integers(0, keys + 1), integers(0, keys + 1)])
        start, end = ends.amin(0), ends.amax(0)
    elif kind == "one_key":
        start = integers(0, keys)
        end = (start + 1).clamp(max=keys)
    elif kind == "sliding":  # a window that moves by a fraction of its length
        start = position * keys // max(T, 1)
        end = (start + max(keys // 3, 1)).clamp(max=keys)
    elif kind == "touching":  # runs of tokens that see runs of keys, one run beside the other, off the media's grid
        width = max(math.ceil(keys / 5), 1)
        run = position * 5 // max(T, 1)
        start, end = (run * width).clamp(max=keys), ((run + 1) * width).clamp(max=keys)
    elif kind == "overlapping":
        width = max(keys // 4, 1)
        run = position * 4 // max(T, 1)
        start, end = (run * width - width // 2).clamp(0, keys), (run * width + width).clamp(max=keys)
    elif kind == "backwards":
        start = (T - 1 - position) * keys // max(T, 1)
        end = (start + L).clamp(max=keys)
    else:
        raise ValueError(f"no such kind of intervals: {kind}")
    return start.int(), end.int()


def run_op(inputs: Inputs) -> Results:
    """Forward and backward of fk.masked_cross_attention on the backend in force."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    o, lse = fk.masked_cross_attention(*leaves, (inputs.start, inputs.end), softmax_scale=inputs.scale, return_lse=True)
    return Results(o.detach(), lse, *torch.autograd.grad(o, leaves, inputs.do))
