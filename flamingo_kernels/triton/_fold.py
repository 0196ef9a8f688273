"""A norm's affine folded into the weight behind it, and the gradients of both: a pass over the weight each.

x̂ · scale weightᵀ + bias weightᵀ = x̂ (weight · scale)ᵀ + weight bias          what for: `_gpu/media_kv.py`
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._gpu.sizes import cdiv

# 8 rows share what is read of scale and bias
_FOLD_TILE = {"BR": 8, "BV": 256, "num_warps": 4}
# 16 columns of bf16 are one sector of memory, and few enough that the width of a media makes some 64 programs
_UNFOLD_TILE = {"BR": 128, "BV": 16, "num_warps": 4}


def fold(weight: Tensor, scale: Tensor, bias: Tensor, folded: Tensor, offset: Tensor) -> None:
    """Write folded = weight · scale [N, V] and offset = weight bias [N]."""
    N, V = weight.shape
    if N:
        with torch.cuda.device_of(weight):
            media_kv_fwd_kernel[(cdiv(N, _FOLD_TILE["BR"]),)](
                weight, scale, bias, folded, offset, N, V, *weight.stride(), **_FOLD_TILE
            )


def unfold(
    p: Tensor, s: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dweight, dscale and dbias; None where not wanted. p [N, V] is dᵀ x̂, s [N] the sum of d."""
    (N, V), (of_weight, of_scale, of_bias) = weight.shape, wanted
    dweight = p if p.dtype == weight.dtype else weight.new_empty((N, V))
    dscale, dbias = torch.empty_like(scale), torch.empty_like(bias)
    if V:
        with torch.cuda.device_of(p):
            media_kv_bwd_kernel[(cdiv(V, _UNFOLD_TILE["BV"]),)](
                *(p, s, weight, scale, bias, dweight, dscale, dbias, N, V, *weight.stride()),
                DWEIGHT=of_weight,
                DSCALE=of_scale,
                DBIAS=of_bias,
                **_UNFOLD_TILE,
            )
    return tuple(dx if of else None for dx, of in zip((dweight, dscale, dbias), wanted, strict=True))


@triton.jit
def media_kv_fwd_kernel(
    weight, scale, bias, folded, offset, rows, V, w_row, w_column, BR: tl.constexpr, BV: tl.constexpr
):
    """folded [rows, V] and offset [rows]. w_row, w_column: the strides of weight.

    Occupancy: 24 warps on a multiprocessor, or more.
    """
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    dots = tl.zeros([BR, BV], tl.float32)
    for v0 in range(0, V, BV):
        v = v0 + tl.arange(0, BV)  # [BV]
        keep = (row < rows)[:, None] & (v < V)[None, :]
        at = weight + row[:, None] * w_row + v[None, :].to(tl.int64) * w_column
        w = tl.load(at, mask=keep, other=0.0).to(tl.float32)  # [BR, BV]
        dots += w * tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
        w *= tl.load(scale + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
        tl.store(folded + row[:, None] * V + v[None, :], w.to(folded.dtype.element_ty), mask=keep)
    tl.store(offset + row, tl.sum(dots, 1).to(offset.dtype.element_ty), mask=row < rows)


@triton.jit
def media_kv_bwd_kernel(
    p,
    s,
    weight,
    scale,
    bias,
    dweight,
    dscale,
    dbias,
    rows,
    V,
    w_row,
    w_column,
    DWEIGHT: tl.constexpr,
    DSCALE: tl.constexpr,
    DBIAS: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
):
    """dweight [rows, V], which may be p, dscale and dbias [V], of a layer. A program owns BV columns.

    p [rows, V] is doutᵀ x̂, s [rows] the sum of dout, fp32. w_row, w_column: the strides of weight.

    Occupancy: 16 warps on a multiprocessor, or more.
    """
    v = tl.program_id(0) * BV + tl.arange(0, BV)  # [BV]
    scale_row = tl.load(scale + v, mask=v < V, other=0.0).to(tl.float32)  # [BV]
    bias_row = tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)  # [BV]
    sum_scale = tl.zeros([BR, BV], tl.float32)
    sum_bias = tl.zeros([BR, BV], tl.float32)
    for r0 in range(0, rows, BR):
        r = (r0 + tl.arange(0, BR)).to(tl.int64)  # [BR]
        keep = (r < rows)[:, None] & (v < V)[None, :]
        at = r[:, None] * V + v[None, :]
        p_tile = tl.load(p + at, mask=keep, other=0.0).to(tl.float32)  # [BR, BV]
        w = tl.load(weight + r[:, None] * w_row + v[None, :].to(tl.int64) * w_column, mask=keep, other=0.0)
        s_tile = tl.load(s + r, mask=r < rows, other=0.0)  # [BR]
        sum_scale += w.to(tl.float32) * p_tile
        sum_bias += w.to(tl.float32) * s_tile[:, None]
        if DWEIGHT:
            out = p_tile * scale_row[None, :] + s_tile[:, None] * bias_row[None, :]
            tl.store(dweight + at, out.to(dweight.dtype.element_ty), mask=keep)
    if DSCALE:
        tl.store(dscale + v, tl.sum(sum_scale, 0).to(dscale.dtype.element_ty), mask=v < V)
    if DBIAS:
        tl.store(dbias + v, tl.sum(sum_bias, 0).to(dbias.dtype.element_ty), mask=v < V)
