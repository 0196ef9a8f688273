"""The norms of `_norm.py` for rows that are too wide for the registers of a block: taken in blocks of columns.

A row is read several times over, for its mean, for its variance and to be normalised, and again in backward. Memory
moves it once: a row of 12288 in bf16 has 24 KiB, which the caches keep. Kernels take the arguments of those of
`_norm.py` and compute the same.
"""

import triton
import triton.language as tl

from flamingo_kernels.triton._rows import scalar_gate

# 16 elements per thread, as in `_norm.py`. Four rows of backward share what is read and written of the sums.
FORWARD_TILE = {"BR": 1, "BC": 4096, "num_warps": 8}
BACKWARD_TILE = {"BR": 4, "BC": 1024, "num_warps": 8}


@triton.jit
def _load(x, row, stride, c0, rows, C: tl.constexpr, BC: tl.constexpr):
    """A tile of rows, fp32 and 0 where there is nothing; and where there is something. [BR, BC]"""
    c = c0 + tl.arange(0, BC)  # [BC]
    keep = (row < rows)[:, None] & (c < C)[None, :]
    return tl.load(x + row[:, None] * stride + c[None, :], mask=keep, other=0.0).to(tl.float32), keep


@triton.jit
def _parameter(x, c0, C: tl.constexpr, BC: tl.constexpr):
    """A block of a norm's weight or bias, fp32 [1, BC]."""
    c = c0 + tl.arange(0, BC)  # [BC]
    return tl.load(x + c, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _centred(x_tile, keep, mean, rest):
    return tl.where(keep, x_tile - mean[:, None] - rest[:, None], 0.0)


@triton.jit
def _average(
    x, row, stride, rows, mean, rest, C: tl.constexpr, SQUARED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """Of x - mean - rest, or of its square, over each row [BR]."""
    total = tl.zeros([BR, BC], tl.float32)
    for c0 in range(0, C, BC):
        x_tile, keep = _load(x, row, stride, c0, rows, C, BC)
        x_tile = _centred(x_tile, keep, mean, rest)
        total += x_tile * x_tile if SQUARED else x_tile
    return tl.sum(total, 1) / C


@triton.jit
def _statistics(x, row, stride, rows, eps, C: tl.constexpr, LAYER: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Of each row the mean, what that was rounded by, and 1 / sqrt(... + eps); the first two are 0 for "rms". [BR]"""
    mean = tl.zeros([BR], tl.float32)
    rest = tl.zeros([BR], tl.float32)
    if LAYER:
        mean = _average(x, row, stride, rows, mean, rest, C, False, BR, BC)
        rest = _average(x, row, stride, rows, mean, rest, C, False, BR, BC)
    return mean, rest, tl.rsqrt(_average(x, row, stride, rows, mean, rest, C, True, BR, BC) + eps)


@triton.jit
def _normalized(x_tile, keep, mean, rest, rstd):
    """x̂; 0 where nothing is, for eps may be 0, and rstd of a row that is not there infinite."""
    return tl.where(keep, _centred(x_tile, keep, mean, rest) * rstd[:, None], 0.0)


@triton.jit
def _add_to_part(part, columns, C: tl.constexpr, c0, first, BC: tl.constexpr):
    """Adds to a program's own sums [C], which begin with its first rows."""
    c = c0 + tl.arange(0, BC)  # [BC]
    tl.store(part + c, tl.load(part + c, mask=(c < C) & ~first, other=0.0) + columns, mask=c < C)


@triton.jit(do_not_specialize=["rows", "programs"])
def wide_norm_fwd_kernel(
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
    """As norm_fwd_kernel; rows of y are read again once they are there.

    Occupancy: 32 warps on a multiprocessor, or more.
    """
    program = tl.program_id(0)
    source, source_row = x, x_row
    if BRANCH:
        source, source_row = y, C
    t = scalar_gate(gate, GATE)
    for tile in range(program, tl.cdiv(rows, BR), programs):
        row = tl.cast(tile, tl.int64) * BR + tl.arange(0, BR)  # [BR]
        if BRANCH:
            for c0 in range(0, C, BC):
                x_tile, keep = _load(x, row, x_row, c0, rows, C, BC)  # [BR, BC]
                added, _keep = _load(branch, row, branch_row, c0, rows, C, BC)  # [BR, BC]
                at = row[:, None] * C + c0 + tl.arange(0, BC)[None, :]
                tl.store(y + at, (x_tile + added * t).to(y.dtype.element_ty), mask=keep)
            tl.debug_barrier()  # they may be read by other threads than those that wrote them
        mean, rest, rstd = _statistics(source, row, source_row, rows, tl.cast(eps, tl.float32), C, LAYER, BR, BC)
        for c0 in range(0, C, BC):
            x_tile, keep = _load(source, row, source_row, c0, rows, C, BC)  # [BR, BC]
            at = row[:, None] * C + c0 + tl.arange(0, BC)[None, :]
            if COPY:
                tl.store(copy + at, x_tile.to(copy.dtype.element_ty), mask=keep)
            z_tile = _normalized(x_tile, keep, mean, rest, rstd)
            if WEIGHT:
                z_tile *= _parameter(weight, c0, C, BC)
            if BIAS:
                z_tile += _parameter(bias, c0, C, BC)
            tl.store(z + at, z_tile.to(z.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows", "programs"])
def wide_norm_bwd_kernel(
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
    """As norm_bwd_kernel; a program's sums are added up in the parts themselves.

    Occupancy: 8 warps on a multiprocessor, or more.
    """
    program = tl.program_id(0)
    part = tl.cast(program, tl.int64) * C
    for tile in range(program, tl.cdiv(rows, BR), programs):
        row = tl.cast(tile, tl.int64) * BR + tl.arange(0, BR)  # [BR]
        mean, rest, rstd = _statistics(x, row, x_row, rows, tl.cast(eps, tl.float32), C, LAYER, BR, BC)
        products = tl.zeros([BR, BC], tl.float32)  # dx̂ · x̂
        total = tl.zeros([BR, BC], tl.float32)  # dx̂
        for c0 in range(0, C, BC):
            x_tile, keep = _load(x, row, x_row, c0, rows, C, BC)  # [BR, BC]
            x_hat = _normalized(x_tile, keep, mean, rest, rstd)
            d, _keep = _load(dz, row, dz_row, c0, rows, C, BC)  # [BR, BC]
            if SUMS:
                _add_to_part(part_weight + part, tl.sum(d * x_hat, 0), C, c0, tile == program, BC)
                _add_to_part(part_bias + part, tl.sum(d, 0), C, c0, tile == program, BC)
            if WEIGHT:
                d *= _parameter(weight, c0, C, BC)
            products += d * x_hat
            total += d
            if Z:
                if WEIGHT:
                    x_hat *= _parameter(weight, c0, C, BC)
                if BIAS:
                    x_hat += _parameter(bias, c0, C, BC)
                tl.store(z + row[:, None] * C + c0 + tl.arange(0, BC)[None, :], x_hat.to(z.dtype.element_ty), mask=keep)
        if DX:
            of_x_hat, of_one = tl.sum(products, 1) / C, tl.sum(total, 1) / C
            for c0 in range(0, C, BC):
                x_tile, keep = _load(x, row, x_row, c0, rows, C, BC)  # [BR, BC]
                d, _keep = _load(dz, row, dz_row, c0, rows, C, BC)  # [BR, BC]
                if WEIGHT:
                    d *= _parameter(weight, c0, C, BC)
                d -= _normalized(x_tile, keep, mean, rest, rstd) * of_x_hat[:, None]
                if LAYER:
                    d -= of_one[:, None]
                d *= rstd[:, None]
                if RESIDUAL:
                    more, _keep = _load(residual, row, residual_row, c0, rows, C, BC)
                    d += more
                tl.store(dx + row[:, None] * C + c0 + tl.arange(0, BC)[None, :], d.to(dx.dtype.element_ty), mask=keep)
        tl.debug_barrier()  # the next rows' sums may be read by other threads than those that wrote these
