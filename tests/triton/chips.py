"""What the chips have that no one here has: by compute capability, and how many warps of a kernel fit.

From the CUDA programming guide's table of technical specifications per compute capability.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """Of a multiprocessor: warps, blocks, and KiB of shared memory; KiB of it that one block may have."""

    warps: int
    blocks: int
    shared: int
    shared_of_block: int


CHIPS = {
    80: Chip(64, 32, 164, 163),
    86: Chip(48, 16, 100, 99),
    89: Chip(48, 24, 100, 99),
    90: Chip(64, 32, 228, 227),
    100: Chip(64, 32, 228, 227),
    120: Chip(48, 24, 100, 99),
}


def occupancy(cc: int, warps: int, registers: int, shared: int) -> int:
    """Warps on a multiprocessor, of a kernel in blocks of `warps` with `registers` per thread and `shared` bytes."""
    chip = CHIPS[cc]
    registers_per_warp = -(-registers * 32 // 256) * 256  # handed out by 256
    by_registers = 65536 // registers_per_warp // warps
    by_shared = chip.shared * 1024 // (-(-shared // 128) * 128 + 1024)  # 1 KiB of each block is the system's
    return min(chip.blocks, chip.warps // warps, by_registers, by_shared) * warps
