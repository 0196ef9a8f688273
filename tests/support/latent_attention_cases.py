"""Inputs of latent_attention from a seed, and what they mean: masked cross-attention over the keys [latents, media]."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import flamingo_kernels as fk
from tests.support import dense_attention
from tests.support.dense_attention import Inputs, Results

LENGTHS = ("none", "full", "ragged", "zero", "one", "some_zero")


class LatentInputs(NamedTuple):
    """q, do [N, R, H, D]; keys and values [N, S or R', G, D]; media_lengths [N] or None."""

    q: Tensor
    k_media: Tensor
    v_media: Tensor
    k_latents: Tensor
    v_latents: Tensor
    do: Tensor
    media_lengths: Tensor | None
    scale: float

    def joined(self) -> Inputs:
        """The same as masked cross-attention."""
        rows, tokens = self.k_media.shape[:2]
        lengths = (
            torch.full((rows,), tokens, device=self.q.device) if self.media_lengths is None else self.media_lengths
        )
        end = (lengths + self.k_latents.shape[1])[:, None].expand(self.q.shape[:2]).int()
        k = torch.cat([self.k_latents, self.k_media], 1)
        v = torch.cat([self.v_latents, self.v_media], 1)
        return Inputs(self.q, k, v, self.do, torch.zeros_like(end), end, self.scale)


class LatentResults(NamedTuple):
    o: Tensor
    lse: Tensor
    dq: Tensor
    dk_media: Tensor
    dv_media: Tensor
    dk_latents: Tensor
    dv_latents: Tensor

    def joined(self) -> Results:
        dk = torch.cat([self.dk_latents, self.dk_media], 1)
        dv = torch.cat([self.dv_latents, self.dv_media], 1)
        return Results(self.o, self.lse, self.dq, dk, dv)


@dataclass(frozen=True)
class LatentCase:
    """lengths: which media_lengths. latents: R', None for R. scale: None for the default. Letters as in the design."""

    dtype: torch.dtype = torch.float32
    lengths: str = "ragged"
    N: int = 2
    S: int = 70
    R: int = 16
    latents: int | None = None
    H: int = 2
    G: int = 2
    D: int = 32
    scale: float | None = None
    seed: int = 0

    def __str__(self) -> str:
        default = LatentCase()
        changed = [f"{name}{value}" for name, value in vars(self).items() if value != getattr(default, name)]
        return "-".join(changed).replace("torch.", "").replace("dtype", "") or "float32"

    def inputs(self, device: str) -> LatentInputs:
        generator = torch.Generator().manual_seed(self.seed)
        latents = self.R if self.latents is None else self.latents

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, self.dtype)

        lengths = _lengths(self.lengths, self.N, self.S, generator)
        return LatentInputs(
            normal(self.N, self.R, self.H, self.D),
            normal(self.N, self.S, self.G, self.D),
            normal(self.N, self.S, self.G, self.D),
            normal(self.N, latents, self.G, self.D),
            normal(self.N, latents, self.G, self.D),
            normal(self.N, self.R, self.H, self.D),
            None if lengths is None else lengths.to(device),
            self.D**-0.5 if self.scale is None else self.scale,
        )


def _lengths(kind: str, N: int, S: int, generator: torch.Generator) -> Tensor | None:
    ragged = torch.randint(0, S + 1, (N,), generator=generator, dtype=torch.int32)
    if kind == "none":
        return None
    if kind == "full":
        return torch.full_like(ragged, S)
    if kind == "ragged":
        return ragged
    if kind == "zero":
        return torch.zeros_like(ragged)
    if kind == "one":
        return torch.full_like(ragged, min(1, S))
    if kind == "some_zero":
        return torch.where(torch.arange(N) % 2 == 0, 0, ragged).int()
    raise ValueError(f"no such kind of lengths: {kind}")


def attend(inputs: LatentInputs, *tensors: Tensor, return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """fk.latent_attention on the first tensors of the inputs, or on others in their place."""
    return fk.latent_attention(
        *(tensors or inputs[:5]),
        media_lengths=inputs.media_lengths,
        softmax_scale=inputs.scale,
        return_lse=return_lse,
    )


def leaves_of(inputs: LatentInputs) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in inputs[:5]]


def run_op(inputs: LatentInputs) -> LatentResults:
    """Forward and backward of fk.latent_attention on the backend in force."""
    leaves = leaves_of(inputs)
    o, lse = attend(inputs, *leaves, return_lse=True)
    return LatentResults(o.detach(), lse, *torch.autograd.grad(o, leaves, inputs.do))


def assert_right(actual: LatentResults, inputs: LatentInputs) -> None:
    """Every result within the error budget."""
    dense_attention.assert_right(actual.joined(), inputs.joined())


def assert_identical(actual: LatentResults, expected: LatentResults) -> None:
    for name in LatentResults._fields:
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
