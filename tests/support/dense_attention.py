"""Masked cross-attention as a Flamingo in plain PyTorch computes it: a dense mask, softmax, two matmuls, autograd.

Written apart from the package's own reference, which it tests too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tests.support.budget import assert_within_budget


class Inputs(NamedTuple):
    """q, do [B, T, H, D]; k, v [B', K, G, D]; start, end [B, T]."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    start: Tensor
    end: Tensor
    scale: float


class Results(NamedTuple):
    o: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """o [B, T, H, D] and lse [B, H, T], in the dtype of q throughout."""
    rows, heads = q.shape[0] // k.shape[0], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(rows, 0).repeat_interleave(heads, 2).transpose(1, 2) for x in (k, v))
    scores = (q * scale).transpose(1, 2) @ k.transpose(-1, -2)  # [B, H, T, K]
    key = torch.arange(k.shape[2], device=k.device)
    hidden = ~((key >= start[..., None]) & (key < end[..., None]))[:, None]
    scores = scores.masked_fill(hidden, float("-inf"))
    p = scores.softmax(-1).masked_fill(hidden, 0)  # the softmax of a row that sees nothing is NaN
    return (p @ v).transpose(1, 2), scores.logsumexp(-1)


def run(inputs: Inputs, dtype: torch.dtype | None = None, *, flipped: bool = False) -> Results:
    """Forward and backward of `attention` in `dtype`; flipped: every sum runs the other way round."""
    q, k, v, do = (x.detach().to(dtype or x.dtype) for x in inputs[:4])
    start, end = inputs.start.long(), inputs.end.long()
    if flipped:
        start, end = k.shape[1] - end, k.shape[1] - start
        q, k, v, do = q.flip(1, 3), k.flip(1, 3), v.flip(1, 3), do.flip(1, 3)
        start, end = start.flip(1), end.flip(1)
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    o, lse = attention(q, k, v, start, end, inputs.scale)
    o.backward(do)
    results = Results(o.detach(), lse.detach(), q.grad, k.grad, v.grad)
    if flipped:
        o, lse, *grads = results
        results = Results(o.flip(1, 3), lse.flip(2), *(x.flip(1, 3) for x in grads))
    return results


def cancelling_terms(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The sums of absolute values behind dq and dk, fp64: ds = p ∘ (do vᵀ - ⟨do, o⟩) vanishes where one key is seen.

    With |·| on every factor: ds' = p ∘ (|do| |v|ᵀ + ⟨|do|, |o|⟩), dq' = |scale| ds' |k|, dk' = |scale| ds'ᵀ |q|.
    """
    q, k, v, do = (x.detach().double() for x in inputs[:4])
    rows, group = q.shape[0] // k.shape[0], q.shape[2] // k.shape[2]
    wide_k, wide_v = (x.repeat_interleave(rows, 0).repeat_interleave(group, 2) for x in (k, v))
    o, lse = attention(q, k, v, inputs.start.long(), inputs.end.long(), inputs.scale)
    key = torch.arange(k.shape[1], device=k.device)
    visible = ((key >= inputs.start[..., None]) & (key < inputs.end[..., None]))[:, None]
    scores = inputs.scale * torch.einsum("bthd,bkhd->bhtk", q, wide_k)
    p = torch.where(visible, (scores - lse[..., None]).exp(), 0)
    ds = torch.einsum("bthd,bkhd->bhtk", do.abs(), wide_v.abs()) + (do * o).abs().sum(-1).transpose(1, 2)[..., None]
    ds = p * ds * abs(inputs.scale)
    dq = torch.einsum("bhtk,bkhd->bthd", ds, wide_k.abs())
    dk = torch.einsum("bhtk,bthd->bkhd", ds, q.abs())
    dk = dk.reshape(k.shape[0], rows, k.shape[1], k.shape[2], group, k.shape[3]).sum((1, 4))
    return dq, dk


def assert_right(actual: Results, inputs: Inputs) -> None:
    """Every result within the error budget; lse, which is fp32 whatever the inputs are, within that of fp32."""
    dtype = inputs.q.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact = run(inputs, torch.float64)
    # at fp64 the first order is the exact one, and only the other one shows how large rounding is
    eager = [run(inputs, dtype), run(inputs, dtype, flipped=True)]
    eager_lse = [run(inputs, wide).lse, run(inputs, wide, flipped=True).lse]
    terms_dq, terms_dk = cancelling_terms(inputs)
    terms = Results(None, None, terms_dq, terms_dk, None)
    for name in Results._fields:
        got = getattr(actual, name)
        expected = wide if name == "lse" else dtype
        assert got.dtype == expected, f"{name}: dtype {got.dtype}, expected {expected}"
        measure = eager_lse if name == "lse" else [getattr(other, name) for other in eager]
        assert_within_budget(name, got, getattr(exact, name), measure, terms=getattr(terms, name))
