"""LayerNorm and RMSNorm over the last dimension, and their backward, on rows of tokens.

    x̂ = (x - mean(x)) / sqrt(var(x) + eps)   "layer"           x̂ = x / sqrt(mean(x²) + eps)   "rms"
    z = x̂ · weight + bias                    either may be None

A program holds whole rows in registers, so statistics cost no second pass over memory: forward reads x and writes z,
backward reads dz and x, takes the statistics again, and writes what is wanted of dx and z, and one part of the sums
that become the gradients of weight and bias. Where x is itself a sum, residual + tanh(gate) · branch, forward reads
both and writes the sum, too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._gpu.sizes import cdiv, next_power_of_2
from flamingo_kernels.triton import _wide_norm
from flamingo_kernels.triton._rows import programs_for_rows, scalar_gate

_WIDEST = 8192
# Elements of a tile: 16 per thread. Backward holds x, dz, two sums and a gradient of them: 5 · 16 registers of the 128
# that a thread has where 16 warps, at C = 8192, are the most in a block; two such blocks fit a multiprocessor. Forward
# holds little, so its tiles are twice that: two blocks then have 16 KiB of bf16 on the way from memory, which is what
# the 600 ns of a miss take at an H100's 25 GB/s and multiprocessor.
_TILE = 2048
_FORWARD_TILE = 4096


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    dtype: torch.dtype,
    copy: bool = False,
) -> tuple[Tensor, Tensor]:
    """z [rows, C] in dtype, of x [rows, C]; and, in the same pass, a contiguous copy of x, or [0] unless asked for."""
    _, z, copied = _forward(x, None, None, weight, bias, norm, eps, dtype, copy)
    return z, copied


def add_normalize(
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
    """y = residual + tanh(gate) · branch [rows, C], z = norm(y) in dtype, and a copy of y, or [0] unless asked for."""
    return _forward(residual, branch, gate, weight, bias, norm, eps, dtype, copy)


def _forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    dtype: torch.dtype,
    copy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, C = x.shape
    y = x.new_empty(0 if branch is None else (rows, C))
    z = x.new_empty((rows, C), dtype=dtype)
    copied = x.new_empty((rows, C) if copy else 0)
    if rows and C:
        wide = C > _WIDEST
        kernel = _wide_norm.wide_norm_fwd_kernel if wide else norm_fwd_kernel
        tile = _wide_norm.FORWARD_TILE if wide else _tile(C, _FORWARD_TILE)
        programs = programs_for_rows(x, cdiv(rows, tile["BR"]))
        with torch.cuda.device_of(x):
            kernel[(programs,)](
                *(x, x if branch is None else branch, x if gate is None else gate),
                *(x if weight is None else weight, x if bias is None else bias, y, z, copied),
                *(eps, rows, programs, x.stride(0), 0 if branch is None else branch.stride(0)),
                C=C,
                LAYER=norm == "layer",
                BRANCH=branch is not None,
                GATE=gate is not None,
                WEIGHT=weight is not None,
                BIAS=bias is not None,
                COPY=copy,
                **tile,
            )
    return y, z, copied


def backward(
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

    dx is in x's dtype, with `residual` [rows, C], the gradient that x has from elsewhere, added to it; z in the dtype
    that is asked for.
    The parts [P, C] are fp32, and what they sum to is dweight = Σ dz · x̂ and dbias = Σ dz.
    """
    rows, C = x.shape
    wide = C > _WIDEST
    kernel = _wide_norm.wide_norm_bwd_kernel if wide else norm_bwd_kernel
    tile = _wide_norm.BACKWARD_TILE if wide else _tile(C, _TILE)
    tiles = cdiv(rows, tile["BR"])
    programs = programs_for_rows(x, tiles) if sums else tiles
    out_dx = x.new_empty((rows, C)) if dx else None
    out_z = None if z is None else x.new_empty((rows, C), dtype=z)
    parts = [x.new_empty((programs, C), dtype=torch.float32) for _ in range(2 if sums else 0)]
    if rows and C:
        with torch.cuda.device_of(x):
            kernel[(programs,)](
                *(dz, x, x if weight is None else weight, x if bias is None else bias),
                *(x if residual is None else residual, x if out_dx is None else out_dx, x if out_z is None else out_z),
                *(parts or (x, x)),
                *(eps, rows, programs, dz.stride(0), x.stride(0), 0 if residual is None else residual.stride(0)),
                C=C,
                LAYER=norm == "layer",
                WEIGHT=weight is not None,
                BIAS=bias is not None,
                RESIDUAL=residual is not None,
                DX=dx,
                Z=z is not None,
                SUMS=sums,
                **tile,
            )
    return out_dx, out_z, parts


def _tile(C: int, elements: int) -> dict[str, int]:
    BC = max(16, next_power_of_2(C))
    BR = max(1, elements // BC)
    return {"BR": BR, "BC": BC, "num_warps": max(4, BR * BC // 512)}


@triton.jit
def _normalize(x, keep, columns, eps, C: tl.constexpr, LAYER: tl.constexpr):
    """x̂ [BR, BC] and the factor 1 / sqrt(... + eps) [BR] of rows x, fp32, which are 0 where they are not kept."""
    if LAYER:
        x = tl.where(columns, x - (tl.sum(x, 1) / C)[:, None], 0.0)
        # what the first mean was rounded by; nothing is left of a constant row
        x = tl.where(columns, x - (tl.sum(x, 1) / C)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / C + eps)
    return tl.where(keep, x * rstd[:, None], 0.0), rstd  # eps may be 0, and rstd of a row that is not there infinite


@triton.jit(do_not_specialize=["rows", "programs"])
def norm_fwd_kernel(
    x,
    branch,
    gate,
    weight,
    bias,
    y,
    z,
    copy,
    eps,
    rows,
    programs,
    x_row,
    branch_row,
    C: tl.constexpr,
    LAYER: tl.constexpr,
    BRANCH: tl.constexpr,
    GATE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    COPY: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """z [rows, C], and a copy of x; with a branch, y = x + tanh(gate) · branch, and both of y in the place of x.

    x_row, branch_row: strides between rows; y, z and copy are contiguous. A program takes every `programs`-th tile of
    rows, and weight and bias once.

    Occupancy: 16 warps on a multiprocessor, or more.
    """
    program = tl.program_id(0)
    c = tl.arange(0, BC)  # [BC]
    columns = (c < C)[None, :]
    if WEIGHT:
        weight_row = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)  # [BC]
    if BIAS:
        bias_row = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)  # [BC]
    t = scalar_gate(gate, GATE)
    for tile in range(program, tl.cdiv(rows, BR), programs):
        row = tl.cast(tile, tl.int64) * BR + tl.arange(0, BR)  # [BR]
        keep = (row < rows)[:, None] & columns
        x_tile = tl.load(x + row[:, None] * x_row + c[None, :], mask=keep, other=0.0)  # [BR, BC]
        at = row[:, None] * C + c[None, :]
        if BRANCH:
            added = tl.load(branch + row[:, None] * branch_row + c[None, :], mask=keep, other=0.0).to(tl.float32)
            x_tile = (x_tile.to(tl.float32) + added * t).to(x.dtype.element_ty)
            tl.store(y + at, x_tile, mask=keep)
        if COPY:
            tl.store(copy + at, x_tile, mask=keep)
        z_tile, _ = _normalize(x_tile.to(tl.float32), keep, columns, tl.cast(eps, tl.float32), C, LAYER)
        if WEIGHT:
            z_tile *= weight_row[None, :]
        if BIAS:
            z_tile += bias_row[None, :]
        tl.store(z + at, z_tile.to(z.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows", "programs"])
def norm_bwd_kernel(
    dz,
    x,
    weight,
    bias,
    residual,
    dx,
    z,
    part_weight,
    part_bias,
    eps,
    rows,
    programs,
    dz_row,
    x_row,
    residual_row,
    C: tl.constexpr,
    LAYER: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DX: tl.constexpr,
    Z: tl.constexpr,
    SUMS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """With dx̂ = dz · weight: dx = residual + rstd · (dx̂ - mean(dx̂) - x̂ mean(dx̂ · x̂)), for "rms" without mean(dx̂).

    A program takes every `programs`-th tile of rows.

    Occupancy: 8 warps on a multiprocessor, or more.
    """
    program = tl.program_id(0)
    c = tl.arange(0, BC)  # [BC]
    columns = (c < C)[None, :]
    if WEIGHT:
        weight_row = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)  # [BC]
    if BIAS:
        bias_row = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)  # [BC]
    sum_weight = tl.zeros([BC], tl.float32)
    sum_bias = tl.zeros([BC], tl.float32)
    for tile in range(program, tl.cdiv(rows, BR), programs):
        row = tl.cast(tile, tl.int64) * BR + tl.arange(0, BR)  # [BR]
        keep = (row < rows)[:, None] & columns
        at = row[:, None] * C + c[None, :]
        x_tile = tl.load(x + row[:, None] * x_row + c[None, :], mask=keep, other=0.0).to(tl.float32)  # [BR, BC]
        d = tl.load(dz + row[:, None] * dz_row + c[None, :], mask=keep, other=0.0).to(tl.float32)  # [BR, BC]
        x_hat, rstd = _normalize(x_tile, keep, columns, tl.cast(eps, tl.float32), C, LAYER)
        if SUMS:
            sum_weight += tl.sum(d * x_hat, 0)
            sum_bias += tl.sum(d, 0)
        if Z:
            z_tile = x_hat
            if WEIGHT:
                z_tile *= weight_row[None, :]
            if BIAS:
                z_tile += bias_row[None, :]
            tl.store(z + at, z_tile.to(z.dtype.element_ty), mask=keep)
        if DX:
            if WEIGHT:
                d *= weight_row[None, :]
            d_out = d - x_hat * (tl.sum(d * x_hat, 1) / C)[:, None]
            if LAYER:
                d_out -= (tl.sum(d, 1) / C)[:, None]
            d_out *= rstd[:, None]
            if RESIDUAL:
                d_out += tl.load(residual + row[:, None] * residual_row + c[None, :], mask=keep, other=0.0).to(
                    tl.float32
                )
            tl.store(dx + at, d_out.to(dx.dtype.element_ty), mask=keep)
    if SUMS:
        tl.store(part_weight + program * C + c, sum_weight, mask=c < C)
        tl.store(part_bias + program * C + c, sum_bias, mask=c < C)
