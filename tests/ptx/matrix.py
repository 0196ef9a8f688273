"""mma.sync: a warp's matrix product, of fragments that lie in its registers.

Products of 16-bit operands are exact and sums are taken in fp32, in numpy's order; a chip sums in another order and
cuts bits off where numpy rounds. Compare with a tolerance, never bit for bit.
"""

import re
from collections.abc import Callable

import numpy as np

from tests.ptx.formats import DTYPES, F32, U16, U32, bf16_to_f32
from tests.ptx.parser import Instruction, Vector
from tests.ptx.warp import LANES, by_warp, whole_warps

_MMA = re.compile(r"mma\.sync\.aligned\.(m16n8k16|m16n8k8)\.row\.col\.f32\.(f16|bf16|tf32)\.(f16|bf16|tf32)\.f32")


def build(code, ins: Instruction) -> Callable | None:
    """The step of a matrix instruction, or None if it is not one."""
    if match := _MMA.fullmatch(ins.opcode):
        shape, a, b = match.groups()
        if a != b or (shape == "m16n8k8") != (a == "tf32"):
            return None
        return _mma(code, ins, a)
    return None


def registers(ins: Instruction, operand, count: int) -> tuple:
    if not isinstance(operand, Vector) or len(operand.items) != count:
        raise ins.error(f"expected {count} registers, got {operand}")
    return operand.items


def values(bits: np.ndarray, t: str) -> np.ndarray:
    """Elements as fp32. Of a tf32 operand the chip does not read the last 13 bits."""
    if t == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(F32)
    return bf16_to_f32(bits) if t == "bf16" else bits.view(DTYPES["f16"]).astype(F32)


def tile(fragments: list[np.ndarray], rows: int, t: str) -> np.ndarray:
    """[warps, 8 · rows, K] from registers [warps, 32] that each hold an 8 × (K / 2) block, in columns of blocks."""
    element = U32 if t == "tf32" else U16
    blocks = np.stack(fragments).view(element)
    _, warps, elements = blocks.shape
    blocks = blocks.reshape(-1, rows, warps, 8, elements // 8)  # [column of blocks, row of blocks, warps, 8, K / 2]
    return values(blocks.transpose(2, 1, 3, 0, 4).reshape(warps, 8 * rows, -1), t)


def _mma(code, ins: Instruction, t: str) -> Callable:
    code.expect(ins, 4)
    d, a, b, c = (registers(ins, operand, count) for operand, count in zip(ins.operands, (4, 4, 2, 4), strict=True))
    read_a, read_b = ([code.read(ins, item, "b32") for item in items] for items in (a, b))
    read_c, write = [code.read(ins, item, "f32") for item in c], [code.write(ins, item, "f32") for item in d]

    def step(w, m):
        whole_warps(m, ins)
        left = tile([by_warp(read(w), w.n) for read in read_a], 2, t)  # [warps, 16, K]
        right = tile([by_warp(read(w), w.n) for read in read_b], 1, t)  # [warps, 8, K]
        product = fragments(left @ right.transpose(0, 2, 1))
        sums = [read(w) + product[i] for i, read in enumerate(read_c)]
        for write_item, value in zip(write, sums, strict=True):
            write_item(w, m, value)

    return step


def fragments(product: np.ndarray) -> np.ndarray:
    """[registers, lanes] of a product [warps, 16, N]: a lane holds pairs of columns, of a row and of the 8th below."""
    warps, _, n = product.shape
    parts = product.reshape(warps, 2, 8, n // 8, 4, 2)  # [warps, half, row, block of columns, pair, column]
    return np.ascontiguousarray(parts.transpose(3, 1, 5, 0, 2, 4)).reshape(n // 2, warps * LANES)
