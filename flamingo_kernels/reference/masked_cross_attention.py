"""Masked cross-attention in plain PyTorch: dense, readable, and what every kernel is measured against.

    s[t, j] = softmax_scale · ⟨q[t], k[j]⟩ where start[t] <= j < end[t], else -inf
    p = softmax(s),  o = p v,  lse[t] = log Σ_j exp s[t, j]

A token that sees nothing has o = 0, lse = -inf and no gradient. Sums and the softmax are in fp32, in fp64 for fp64.
"""

import torch
from torch import Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """o [B, T, H, D] like q, lse [B, H, T] in the accumulation dtype. Shapes as in the public op."""
    start, end = within_keys(start, end, k.shape[1])
    q_, k_, v_, visible = _wide(q, k, v, start, end)
    scores = _scores(q_, k_, visible, softmax_scale)
    lse = scores.logsumexp(-1)
    p = _softmax(scores, lse)
    o = torch.einsum("bhtk,bkhd->bthd", p, v_)
    return o.to(q.dtype).contiguous(), lse.contiguous()


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    o: Tensor,
    lse: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. With δ[t] = ⟨do[t], o[t]⟩: ds = p ∘ (do vᵀ - δ),  dq = scale·ds k,  dk = scale·dsᵀ q,  dv = pᵀ do."""
    start, end = within_keys(start, end, k.shape[1])
    q_, k_, v_, visible = _wide(q, k, v, start, end)
    do_, o_ = do.to(q_.dtype), o.to(q_.dtype)
    p = _softmax(_scores(q_, k_, visible, softmax_scale), lse)
    dp = torch.einsum("bthd,bkhd->bhtk", do_, v_)
    delta = torch.einsum("bthd,bthd->bht", do_, o_).unsqueeze(-1)
    ds = torch.where(visible[:, None], p * (dp - delta), 0) * softmax_scale
    dq = torch.einsum("bhtk,bkhd->bthd", ds, k_)
    dk = torch.einsum("bhtk,bthd->bkhd", ds, q_)
    dv = torch.einsum("bhtk,bthd->bkhd", p, do_)
    return dq.to(q.dtype).contiguous(), _narrow(dk, k), _narrow(dv, v)


def within_keys(start: Tensor, end: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Intervals outside 0..K: ValueError on the CPU; clamped on a GPU, where looking would cost a sync."""
    if start.device.type != "cpu":
        return start.clamp(0, keys), end.clamp(0, keys)
    if start.numel() and (min(start.min(), end.min()) < 0 or max(start.max(), end.max()) > keys):
        raise ValueError(
            f"masked_cross_attention: intervals must lie within 0..{keys}, the key axis, got start in "
            f"[{start.min()}, {start.max()}] and end in [{end.min()}, {end.max()}]"
        )
    return start, end


def _wide(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v in the accumulation dtype with k and v repeated to q's rows and heads, and visible [B, T, K]."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    position = torch.arange(k.shape[1], device=k.device)
    visible = (position >= start.unsqueeze(-1)) & (position < end.unsqueeze(-1))
    rows = q.shape[0] // max(k.shape[0], 1)
    group = q.shape[2] // max(k.shape[2], 1)
    seen = visible.any(1)[:, :, None, None]  # what a key holds that nobody sees must reach nobody, even a NaN

    def widen(x: Tensor) -> Tensor:
        x = x.to(dtype).repeat_interleave(rows, 0).repeat_interleave(group, 2)
        return torch.where(seen, x, 0)

    return q.to(dtype), widen(k), widen(v), visible


def _scores(q: Tensor, k: Tensor, visible: Tensor, softmax_scale: float) -> Tensor:
    scores = torch.einsum("bthd,bkhd->bhtk", q, k) * softmax_scale
    return scores.masked_fill(~visible[:, None], float("-inf"))


def _softmax(scores: Tensor, lse: Tensor) -> Tensor:
    """0 for tokens that see nothing. Divided by its sum, since in a large lse the log of a sum is rounded away."""
    p = torch.exp(scores - torch.where(lse == float("-inf"), 0, lse).unsqueeze(-1))
    return p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)


def _narrow(dx: Tensor, x: Tensor) -> Tensor:
    """Sum the gradient of repeated rows and heads back to the shape of k or v."""
    keys, heads = x.shape[1:3]
    rows = dx.shape[0] // max(x.shape[0], 1)
    group = dx.shape[2] // max(heads, 1)
    dx = dx.reshape(x.shape[0], rows, keys, heads, group, x.shape[3])
    return dx.sum((1, 4)).to(x.dtype).contiguous()
