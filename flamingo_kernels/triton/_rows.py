"""What the kernels on rows of tokens share: their tiles, tanh, and the sums over all rows.

A sum over rows (of a norm's or a gate's gradient) is taken in two steps in a fixed order: every program writes its own
part, in fp32, and `row_sums_kernel` adds the parts up. No atomics, so the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flamingo_kernels._gpu.sizes import cdiv, processors_of

_LOG2E = tl.constexpr(1.4426950408889634)
_SUM_TILE = tl.constexpr(64)


def programs_for_rows(x: Tensor, tiles: int) -> int:
    """How many programs share the tiles of all rows, where each has something that it reads or writes but once.

    Two per multiprocessor, so that one computes while the other waits for memory.
    """
    on_gpu = x.device.type == "cuda"
    processors = processors_of(x.device) if on_gpu else 4
    return min(tiles, 2 * processors)


def sum_rows(parts: list[tuple[Tensor, Tensor, Tensor | None]]) -> None:
    """out = Σ over the first dimension of part [P, n] fp32, for up to three (part, out, gate), in one launch.

    With a gate, of one number, the sum is multiplied by 1 - tanh²(gate): it was that of tanh(gate)'s gradient.
    """
    parts = [each for each in parts if each[1].numel()]
    if not parts:
        return
    (first, out, _), *_ = parts
    sizes, arguments = [], []
    for part, result, gate in (*parts, *[(first, out, None)] * (3 - len(parts))):
        arguments += [part, result, part if gate is None else gate, part.shape[0], part.shape[1]]
        sizes.append(cdiv(part.shape[1], _SUM_TILE.value))
    sizes = sizes[: len(parts)] + [0] * (3 - len(parts))
    gated = [i for i, (_, _, gate) in enumerate(parts) if gate is not None]
    with torch.cuda.device_of(first):
        row_sums_kernel[(sum(sizes),)](
            *arguments, sizes[0], sizes[1], GATED=gated[0] if gated else -1, BN=_SUM_TILE.value, BP=32, num_warps=4
        )


@triton.jit
def tanh(x):
    """Of fp32, to its last bits also where x is small: a gate starts at 0, and its tanh scales gradients.

    Up to 0.625 the odd polynomial of Cephes' tanhf, beyond it by one exponential.
    """
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    small = x + x * square * series
    decay = tl.exp2(tl.abs(x) * (-2.0 * _LOG2E))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def scalar_gate(gate, GATED: tl.constexpr):
    """tanh of a gate of one number; 1 without a gate."""
    t = 1.0
    if GATED:
        t = tanh(tl.load(gate).to(tl.float32))
    return t


@triton.jit(do_not_specialize=["parts_a", "parts_b", "parts_c", "programs_a", "programs_b"])
def row_sums_kernel(
    part_a,
    out_a,
    gate_a,
    parts_a,
    n_a,
    part_b,
    out_b,
    gate_b,
    parts_b,
    n_b,
    part_c,
    out_c,
    gate_c,
    parts_c,
    n_c,
    programs_a,
    programs_b,
    GATED: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    """The first programs are of a, then come those of b and of c. GATED: which of the three has a gate, or -1.

    Occupancy: 40 warps on a multiprocessor, or more.
    """
    program = tl.program_id(0)
    if program < programs_a:
        _sum_columns(part_a, out_a, gate_a, parts_a, n_a, program, GATED == 0, BN, BP)
    elif program < programs_a + programs_b:
        _sum_columns(part_b, out_b, gate_b, parts_b, n_b, program - programs_a, GATED == 1, BN, BP)
    else:
        _sum_columns(part_c, out_c, gate_c, parts_c, n_c, program - programs_a - programs_b, GATED == 2, BN, BP)


@triton.jit
def _sum_columns(part, out, gate, parts, n, block, GATED: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr):
    """BN columns of part [parts, n], BP rows at a time."""
    column = block * BN + tl.arange(0, BN)  # [BN]
    total = tl.zeros([BP, BN], tl.float32)
    for p0 in range(0, parts, BP):
        p = p0 + tl.arange(0, BP)  # [BP]
        keep = (p < parts)[:, None] & (column < n)[None, :]
        total += tl.load(part + p[:, None].to(tl.int64) * n + column[None, :], mask=keep, other=0.0)  # [BP, BN]
    result = tl.sum(total, 0)
    if GATED:
        t = scalar_gate(gate, True)
        result *= 1.0 - t * t
    tl.store(out + column, result.to(out.dtype.element_ty), mask=column < n)
