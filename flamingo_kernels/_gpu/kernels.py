"""What a backend brings to the ops of this package: the passes over memory that stand between two matmuls.

Rows are [rows, C] with the elements of a row side by side and any stride between rows; parameters, gates and results
are contiguous. fp32, bf16 or fp16; sums and statistics are fp32. Nothing uses atomics, so the same inputs give the same
bits.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# (part [P, n] fp32, out of n numbers, gate of one number or None): what out waits for, see `sum_rows`
Sum = tuple[Tensor, Tensor, Tensor | None]


class Attention(Protocol):
    """`masked_cross_attention` of the backend."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, softmax_scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor,
        end: Tensor,
        out: Tensor,
        lse: Tensor,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class Kernels(Protocol):
    """A module with these names."""

    BACKEND: str
    attention: Attention

    def normalize(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: str,
        eps: float,
        dtype: torch.dtype,
        copy: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """z = norm(x) [rows, C] in dtype; and, in the same pass, a contiguous copy of x, or [0] unless asked for."""

    def add_normalize(
        self,
        residual: Tensor,
        branch: Tensor,
        gate: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: str,
        eps: float,
        dtype: torch.dtype,
        copy: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y = residual + tanh(gate) · branch, of one dtype, with a gate of one number; then, of y, as `normalize`."""

    def norm_backward(
        self,
        dz: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: str,
        eps: float,
        *,
        residual: Tensor | None,
        dx: bool,
        z: torch.dtype | None,
        sums: bool,
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        """dx, z, and the parts of dweight and of dbias, of dz and x [rows, C]; None or no parts unless asked for.

        dx is in x's dtype, with `residual` [rows, C], the gradient that x has from elsewhere, added to it; z in the
        dtype that is asked for. The parts [P, C] are fp32; they sum to dweight = Σ dz · x̂ and dbias = Σ dz.
        """

    def activate(self, activation: str, h: Tensor, gate: Tensor | None) -> Tensor:
        """tanh(gate) · act(h) [rows, F] in h's dtype, of h [rows, F] ([rows, 2F] for swiglu), a gate of one number."""

    def activation_backward(
        self, activation: str, da: Tensor | None, h: Tensor, gate: Tensor | None, *, dh: bool, a: bool, sums: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dh like h, tanh(gate) · act(h) in h's dtype, and parts [P, 1] fp32 of Σ da · act(h); None unless asked for.

        da [rows, F] is the gradient of tanh(gate) · act(h) over tanh(gate). dh takes da's memory where it is like it.
        """

    def add(self, residual: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
        """residual + tanh(gate) · branch, both [rows, C], in residual's dtype; a gate of one number or of [C]."""

    def scale(self, x: Tensor, gate: Tensor) -> Tensor:
        """tanh(gate) · x [rows, C] in x's dtype."""

    def weight_gradients(self, p: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """dW = tanh(gate) · p, which takes the memory of p, and dgate = (1 - tanh²(gate)) · Σ p ∘ weight, by rows.

        p and weight [C, K], weight with any strides, gate [C].
        """

    def sum_rows(self, parts: list[Sum]) -> None:
        """out = Σ over the first dimension of part, for up to three, in one launch.

        With a gate, of one number, the sum is multiplied by 1 - tanh²(gate): it was that of tanh(gate)'s gradient.
        """

    def fold(self, weight: Tensor, scale: Tensor, bias: Tensor, folded: Tensor, offset: Tensor) -> None:
        """Write folded = weight · scale [N, V] and offset = weight bias [N]; weight with any strides."""

    def unfold(
        self, p: Tensor, s: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dweight = p · scale + s biasᵀ, dscale = Σ p ∘ weight and dbias = Σ weight · s over rows; None if not wanted.

        p and weight [N, V], s [N] fp32. dweight takes the memory of p where it is of weight's dtype.
        """
