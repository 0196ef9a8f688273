"""A tanh gate of one number or of one per channel, in front of a residual; and its gradient per channel.

    y = residual + tanh(gate) · branch

Per channel, tanh(gate) scales rows of the weight: with P = dyᵀ x, dW = tanh(gate) · P by rows and
dgate = (1 - tanh²(gate)) · Σ P ∘ W by rows, so one pass over P and W gives both. Of one number: see `_activation.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._gpu.rows import is_vector
from flamingo_kernels._gpu.sizes import cdiv
from flamingo_kernels.triton._rows import tanh

_TILE = {"BR": 4, "BC": 1024, "num_warps": 4}  # 32 elements per thread, of each of two or three tensors
_WEIGHT_TILE = {"BR": 4, "BC": 256, "num_warps": 4}


def add(residual: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """residual + tanh(gate) · branch, both [rows, C], in residual's dtype; contiguous."""
    return _scale(branch, gate, residual, residual.dtype)


def scale(x: Tensor, gate: Tensor) -> Tensor:
    """tanh(gate) · x [rows, C] in x's dtype; contiguous."""
    return _scale(x, gate, None, x.dtype)


def _scale(x: Tensor, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows, C = x.shape
    y = x.new_empty((rows, C), dtype=dtype)
    if y.numel():
        grid = (cdiv(rows, _TILE["BR"]) * cdiv(C, _TILE["BC"]),)
        with torch.cuda.device_of(x):
            gate_residual_fwd_kernel[grid](
                *(x, x if residual is None else residual, x if gate is None else gate, y),
                *(rows, C, x.stride(0), 0 if residual is None else residual.stride(0)),
                GATE="none" if gate is None else "vector" if is_vector(gate) else "scalar",
                RESIDUAL=residual is not None,
                **_TILE,
            )
    return y


def weight_gradients(p: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """dW, which takes the memory of p, and dgate [C], of p and weight [C, K] and a gate [C]."""
    C, K = weight.shape
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(p):
        gate_bwd_kernel[(cdiv(C, _WEIGHT_TILE["BR"]),)](
            p, weight, gate, dgate, C, K, weight.stride(0), weight.stride(1), **_WEIGHT_TILE
        )
    return p, dgate


@triton.jit(do_not_specialize=["rows"])
def gate_residual_fwd_kernel(
    x,
    residual,
    gate,
    y,
    rows,
    C,
    x_row,
    residual_row,
    GATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """y [rows, C] contiguous. x_row, residual_row: strides between rows.

    Occupancy: 32 warps on a multiprocessor, or more.
    """
    blocks = tl.cdiv(C, BC)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    c = program % blocks * BC + tl.arange(0, BC)  # [BC]
    keep = (row < rows)[:, None] & (c < C)[None, :]
    out = tl.load(x + row[:, None] * x_row + c[None, :], mask=keep, other=0.0).to(tl.float32)  # [BR, BC]
    if GATE == "scalar":
        out *= tanh(tl.load(gate).to(tl.float32))
    elif GATE == "vector":
        out *= tanh(tl.load(gate + c, mask=c < C, other=0.0).to(tl.float32))[None, :]
    if RESIDUAL:
        out += tl.load(residual + row[:, None] * residual_row + c[None, :], mask=keep, other=0.0).to(tl.float32)
    tl.store(y + row[:, None] * C + c[None, :], out.to(y.dtype.element_ty), mask=keep)


@triton.jit
def gate_bwd_kernel(p, weight, gate, dgate, C, K, w_row, w_column, BR: tl.constexpr, BC: tl.constexpr):
    """dW over p [C, K] and dgate [C]. w_row, w_column: the strides of weight.

    Occupancy: 40 warps on a multiprocessor, or more.
    """
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    t = tanh(tl.load(gate + row, mask=row < C, other=0.0).to(tl.float32))  # [BR]
    dots = tl.zeros([BR, BC], tl.float32)
    for k0 in range(0, K, BC):
        k = k0 + tl.arange(0, BC)  # [BC]
        keep = (row < C)[:, None] & (k < K)[None, :]
        at = p + row[:, None] * K + k[None, :]
        p_tile = tl.load(at, mask=keep, other=0.0).to(tl.float32)  # [BR, BC]
        w = weight + row[:, None] * w_row + k[None, :].to(tl.int64) * w_column
        dots += p_tile * tl.load(w, mask=keep, other=0.0).to(tl.float32)
        tl.store(at, (p_tile * t[:, None]).to(p.dtype.element_ty), mask=keep)
    tl.store(dgate + row, (tl.sum(dots, 1) * (1.0 - t * t)).to(dgate.dtype.element_ty), mask=row < C)
