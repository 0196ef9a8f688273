"""A program that prints which arithmetic the interpreter gets right, as JSON; with the argument `mend`, mended first.

A process of its own, because TRITON_INTERPRET=1 has to be set before kernels are defined and a mend stays.
"""

import json
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.triton import interpreter

N = tl.constexpr(16)


@triton.jit
def _dot_kernel(x, y, out, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]  # [N, N]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at), input_precision=PRECISION))


@triton.jit
def _round_kernel(x, out):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(tl.bfloat16))


def _dot(x: Tensor, y: Tensor, precision: str) -> Tensor:
    out = torch.empty(N.value, N.value)
    _dot_kernel[(1,)](x, y, out, PRECISION=precision)
    return out


def bf16_dot() -> bool:
    """Products of bf16 numbers are exact in fp32, so only the order of the sums is free."""
    x, y = torch.randn(2, N.value, N.value, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() @ y.double()
    terms = x.double().abs() @ y.double().abs()
    return bool(((_dot(x, y, "ieee") - exact).abs() <= N.value * torch.finfo(torch.float32).eps * terms).all())


def bf16_rounding() -> bool:
    """Below, on and above ties, signed, overflowing, infinite and not a number."""
    tie = 2.0**-8
    x = [1 + tie * n / 2 for n in range(8)] + [-1 - tie, -1 - 3 * tie, 0.0, 3.4e38, -3.4e38]
    x = torch.tensor([*x, float("inf"), float("-inf"), float("nan")])
    out = torch.empty(N.value, dtype=torch.bfloat16)
    _round_kernel[(1,)](x, out)
    return torch.equal(out.nan_to_num(nan=7.0), x.bfloat16().nan_to_num(nan=7.0))


def tf32_dot() -> bool:
    """With the identity a dot shows how its other operand was rounded: to 10 bits, ties away from zero."""
    ulp = 2.0**-10
    column = torch.tensor([1 + ulp / 4, 1 + ulp / 2, 1 + ulp * 3 / 4, -1 - ulp / 2], dtype=torch.float32).repeat(4)
    rounded = torch.tensor([1.0, 1 + ulp, 1 + ulp, -1 - ulp]).repeat(4)
    x = column[:, None].expand(N.value, N.value).contiguous()
    return torch.equal(_dot(x, torch.eye(N.value), "tf32"), rounded[:, None].expand_as(x))


if __name__ == "__main__":
    if sys.argv[1:] == ["mend"]:
        interpreter.mend()
        interpreter.mend()
    print(json.dumps({check.__name__: check() for check in (bf16_dot, bf16_rounding, tf32_dot)}))
