"""What stands between two matmuls: an activation and a tanh gate, forward and backward, one pass over memory each.

A gate of one number scales the operand of the matmul that follows, a' = tanh(gate) · act(h), for (tanh(gate) · a) wᵀ is
tanh(gate) · (a wᵀ). Backward then needs nothing of the weight's size for it: with da' = dy w,

    dh = tanh(gate) · da' · act'(h),   dw = dyᵀ a',   dgate = (1 - tanh²(gate)) · Σ da' · act(h)

The activations and their derivatives are those of the public op (`gated_mlp`); "identity" is a gate alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._gpu.sizes import cdiv
from flamingo_kernels.triton._rows import scalar_gate, tanh

# 1024 columns of 4 rows, 32 elements per thread: a warp reads 512 bytes of bf16 in a row, and no register spills
_TILE = {"BR": 4, "BF": 1024, "num_warps": 4}
_NARROW = {"BR": 32, "BF": 128, "num_warps": 4}
_BETA = tl.constexpr(0.7978845608028654)  # √(2/π)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / √(2π)


def activate(activation: str, h: Tensor, gate: Tensor | None) -> Tensor:
    """tanh(gate) · act(h) [rows, F] in h's dtype, of h [rows, F] ([rows, 2F] for swiglu) and a gate of one number."""
    rows, F = _shape(activation, h)
    a = h.new_empty((rows, F))
    if a.numel():
        tile = _tile(F)
        with torch.cuda.device_of(h):
            activation_fwd_kernel[_grid(rows, F, tile)](
                *(h, h if gate is None else gate, a, rows, F, h.stride(0)),
                ACT=activation,
                GATED=gate is not None,
                **tile,
            )
    return a


def backward(
    activation: str, da: Tensor | None, h: Tensor, gate: Tensor | None, *, dh: bool, a: bool, sums: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh like h, tanh(gate) · act(h) in h's dtype, and the parts [P, 1] fp32 of Σ da · act(h); None unless asked for.

    da [rows, F] is the gradient of tanh(gate) · act(h) over tanh(gate). dh takes da's memory where it is like it.
    """
    if not (dh or sums):
        return None, activate(activation, h, gate) if a else None, None
    rows, F = _shape(activation, h)
    tile = _tile(F)
    grid = _grid(rows, F, tile)
    out_dh = None
    if dh:
        out_dh = da if activation != "swiglu" and da.dtype == h.dtype else h.new_empty(h.shape)
    out_a = h.new_empty((rows, F)) if a else None
    part = h.new_empty((*grid, 1), dtype=torch.float32) if sums else None
    if rows and F:
        with torch.cuda.device_of(h):
            activation_bwd_kernel[grid](
                *(da, h, h if gate is None else gate),
                *(h if out_dh is None else out_dh, h if out_a is None else out_a, h if part is None else part),
                *(rows, F, da.stride(0), h.stride(0)),
                ACT=activation,
                GATED=gate is not None,
                DH=dh,
                A=a,
                SUMS=sums,
                **tile,
            )
    return out_dh, out_a, part


def _shape(activation: str, h: Tensor) -> tuple[int, int]:
    return h.shape[0], h.shape[1] // 2 if activation == "swiglu" else h.shape[1]


def _tile(F: int) -> dict[str, int]:
    return _TILE if F > 512 else _NARROW


def _grid(rows: int, F: int, tile: dict[str, int]) -> tuple[int]:
    return (cdiv(rows, tile["BR"]) * cdiv(F, tile["BF"]),)


@triton.jit
def _act(h, ACT: tl.constexpr):
    """act(h) and act'(h), fp32; a NaN stays one."""
    if ACT == "identity":
        a, slope = h, tl.full(h.shape, 1.0, tl.float32)
    elif ACT == "relu":
        a = tl.where(h < 0, 0.0, h)
        slope = tl.where(h > 0, 1.0, tl.where(h <= 0, 0.0, h))
    elif ACT == "squared_relu":
        r = tl.where(h < 0, 0.0, h)
        a, slope = r * r, 2.0 * r
    elif ACT == "silu":
        s = tl.sigmoid(h)
        a, slope = h * s, s * (1.0 + h * (1.0 - s))
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(h * _SQRT_HALF))
        a, slope = h * cdf, cdf + h * tl.exp(-0.5 * h * h) * _DENSITY
    else:
        tl.static_assert(ACT == "gelu_tanh")
        # beyond 10, act and its slope are their limits to the last bit, and h³ may overflow
        c = tl.where(h > 10.0, 10.0, tl.where(h < -10.0, -10.0, h))
        t = tanh((c + 0.044715 * c * c * c) * _BETA)
        a = 0.5 * h * (1.0 + t)
        slope = 0.5 * (1.0 + t + c * (1.0 - t * t) * (1.0 + 0.134145 * c * c) * _BETA)
    return a, slope


@triton.jit
def _place(rows, F, BR: tl.constexpr, BF: tl.constexpr):
    """A program's rows [BR], columns [BF], and which of them are there."""
    blocks = tl.cdiv(F, BF)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * BR + tl.arange(0, BR)
    f = program % blocks * BF + tl.arange(0, BF)
    return row, f, (row < rows)[:, None] & (f < F)[None, :]


@triton.jit(do_not_specialize=["rows"])
def activation_fwd_kernel(
    h, gate, a, rows, F, h_row, ACT: tl.constexpr, GATED: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr
):
    """a [rows, F]. h_row: the stride between rows of h, whose up half, for swiglu, stands F after its gate half.

    Occupancy: 20 warps on a multiprocessor, or more.
    """
    row, f, keep = _place(rows, F, BR, BF)
    at = row[:, None] * h_row + f[None, :]
    tile = tl.load(h + at, mask=keep, other=0.0).to(tl.float32)  # [BR, BF]
    if ACT == "swiglu":
        out, _ = _act(tile, "silu")
        out *= tl.load(h + at + F, mask=keep, other=0.0).to(tl.float32)
    else:
        out, _ = _act(tile, ACT)
    out *= scalar_gate(gate, GATED)
    tl.store(a + row[:, None] * F + f[None, :], out.to(a.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows"])
def activation_bwd_kernel(
    da,
    h,
    gate,
    dh,
    a,
    part,
    rows,
    F,
    da_row,
    h_row,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    DH: tl.constexpr,
    A: tl.constexpr,
    SUMS: tl.constexpr,
    BR: tl.constexpr,
    BF: tl.constexpr,
):
    """dh and a, contiguous, and this program's part of Σ da · act(h).

    Occupancy: 12 warps on a multiprocessor, or more.
    """
    row, f, keep = _place(rows, F, BR, BF)
    at = row[:, None] * h_row + f[None, :]
    tile = tl.load(h + at, mask=keep, other=0.0).to(tl.float32)  # [BR, BF]
    d = tl.load(da + row[:, None] * da_row + f[None, :], mask=keep, other=0.0).to(tl.float32)  # [BR, BF]
    t = scalar_gate(gate, GATED)
    out = row[:, None] * F + f[None, :]
    if ACT == "swiglu":
        silu, slope = _act(tile, "silu")
        up = tl.load(h + at + F, mask=keep, other=0.0).to(tl.float32)  # [BR, BF]
        act = silu * up
        if DH:
            out_dh = dh + row[:, None] * (2 * F) + f[None, :]
            tl.store(out_dh, (t * d * slope * up).to(dh.dtype.element_ty), mask=keep)
            tl.store(out_dh + F, (t * d * silu).to(dh.dtype.element_ty), mask=keep)
    else:
        act, slope = _act(tile, ACT)
        if DH:
            tl.store(dh + out, (t * d * slope).to(dh.dtype.element_ty), mask=keep)
    if A:
        tl.store(a + out, (t * act).to(a.dtype.element_ty), mask=keep)
    if SUMS:
        # masked, for a NaN or an infinity of act times the 0 of an element that is not there is not 0
        tl.store(part + tl.program_id(0), tl.sum(tl.where(keep, d * act, 0.0)))
