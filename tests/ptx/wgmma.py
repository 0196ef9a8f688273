"""wgmma: the products of a warpgroup's four warps, of tiles that descriptors point at in shared memory.

A warp computes its own 16 of the 64 rows and needs no other warp for that, so warps may run one after the other. The
product is asynchronous: its accumulators are poison until they are waited for, and its tiles must not change before.
"""

import re
from collections.abc import Callable

import numpy as np

from tests.ptx.access import load_shared
from tests.ptx.formats import U16, U32
from tests.ptx.matrix import fragments, registers, tile, values
from tests.ptx.parser import Immediate, Instruction, Register, Vector
from tests.ptx.warp import LANES, by_warp, whole_warps

_PRODUCT = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(16|8)\.f32\.(f16|bf16|tf32)\.(f16|bf16|tf32)")
_SWIZZLES = {1: (128, 7), 2: (64, 3), 3: (32, 1)}  # mode -> bytes of a row, and which bits of its number are mixed in


def build(code, ins: Instruction) -> Callable | None:
    """The step of a warpgroup's instruction, or None if it is not one."""
    if match := _PRODUCT.fullmatch(ins.opcode):
        n, k, a, b = match.groups()
        known = a == b and (k == "8") == (a == "tf32") and int(n) % 8 == 0 and 8 <= int(n) <= 256
        return _product(code, ins, int(n), a) if known else None
    if ins.opcode == "wgmma.fence.sync.aligned":
        code.expect(ins, 0)
        return lambda w, m: whole_warps(m, ins)
    if ins.opcode == "wgmma.commit_group.sync.aligned":
        code.expect(ins, 0)
        return lambda w, m: w.products.commit(m)
    if ins.opcode == "wgmma.wait_group.sync.aligned":
        code.expect(ins, 1)
        if not isinstance(ins.operands[0], Immediate):
            raise ins.error("the number of groups must be a constant")
        return lambda w, m: w.products.land(w, m, ins.operands[0].value)
    return None


def _product(code, ins: Instruction, n: int, t: str) -> Callable:
    in_registers = isinstance(ins.operands[1], Vector)
    code.expect(ins, 6 if t == "tf32" else 7 if in_registers else 8)
    d = registers(ins, ins.operands[0], n // 2)
    if not all(isinstance(item, Register) and item.width == 32 for item in d):
        raise ins.error("accumulators must be registers of 32 bits")
    flags = ins.operands[6:]
    if ins.operands[4:6] != (Immediate(1), Immediate(1)) or any(flag.value not in (0, 1) for flag in flags):
        raise ins.error("a negated operand is not known")
    flipped_b, flipped_a = bool(flags and flags[-1].value), bool(len(flags) == 2 and flags[0].value)
    items = registers(ins, ins.operands[1], 4) if in_registers else (ins.operands[1],)
    read_a = [code.read(ins, item, "b32" if in_registers else "u64") for item in items]
    read_b, keep = code.read(ins, ins.operands[2], "u64"), code.read(ins, ins.operands[3], "pred")
    accumulators = tuple(item.index for item in d)

    def step(w, m):
        whole_warps(m, ins)
        a, b = [by_warp(read(w), w.n) for read in read_a], by_warp(read_b(w), w.n)

        def operands(issued: bool):
            right = _Tile(b, m, ins, issued).read(w, n, np.zeros(1, np.int64), flipped_b, t)
            if in_registers:
                return tile(a, 2, t), right
            return _Tile(a[0], m, ins, issued).read(w, 16, w.warp % 4 * 16, flipped_a, t), right

        left, right = operands(True)

        def check(due: np.ndarray) -> None:
            for now, before in zip(operands(False), (left, right), strict=True):
                if not np.array_equal(now[due[::LANES]], before[due[::LANES]], equal_nan=True):
                    raise ins.error("a tile in shared memory was overwritten before the product was waited for")

        product = fragments(left @ right.transpose(0, 2, 1))
        w.products.add(w, m, accumulators, product, np.broadcast_to(keep(w), w.n), check)

    return step


class _Tile:
    """Matrices in shared memory, one a warp, as their descriptors lay them out."""

    def __init__(self, descriptors: np.ndarray, m: np.ndarray | None, ins: Instruction, issued: bool) -> None:
        """descriptors: uint64 [warps, 32]. Of warps that the mask leaves out they may be anything.

        issued: whether the product is, and not waited for.
        """
        active = np.ones(len(descriptors), bool) if m is None else m.reshape(-1, LANES)[:, 0]
        first = descriptors[:, 0].astype(np.int64)
        mode = int(first[active][0]) >> 62 & 3
        if (descriptors[active] != descriptors[active, :1]).any() or (first[active] >> 62 & 3 != mode).any():
            raise ins.error("lanes have different descriptors")
        if mode not in _SWIZZLES or (first[active] >> 49 & 7).any():
            raise ins.error("a tile without swizzle, or with a base offset, is not known")
        self.ins, self.active, self.issued = ins, active, issued
        self.width, self.mixed = _SWIZZLES[mode]
        self.start, self.leading, self.stride = ((first >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))

    def read(self, w, rows: int, first_row: np.ndarray, flipped: bool, t: str) -> np.ndarray:
        """[warps, rows, K] fp32, from row first_row [warps] on. flipped: rows lie side by side, not elements of one."""
        start, leading, stride = (x[:, None, None] for x in (self.start, self.leading, self.stride))
        if flipped and t == "tf32":
            raise self.ins.error("rows of tf32 side by side are not known")
        if flipped:  # a piece of 16 bytes holds 8 rows of one k
            row, k = np.arange(0, rows, 8)[None, None, :] + first_row[:, None, None], np.arange(16)[None, :, None]
            at = row * 2 % self.width + row * 2 // self.width * leading + k % 8 * self.width + k // 8 * stride
        else:
            row, piece = np.arange(rows)[None, :, None] + first_row[:, None, None], np.arange(2)[None, None, :]
            at = row % 8 * self.width + row // 8 * stride + piece * 16
        at = np.broadcast_to(start + at, (len(start), *at.shape[1:]))
        at = at ^ ((at >> 7 & self.mixed) << 4)
        pieces = at.shape[1] * at.shape[2]
        active = None if self.active.all() else np.repeat(self.active, pieces)
        lanes, addresses = _Pieces(w, pieces), at.reshape(-1)
        if self.issued:
            here = slice(None) if active is None else active
            w.shared.read_by_product(addresses[here], lanes.rows[here], 16, self.ins)
        words = load_shared(lanes, addresses, active, 16, self.ins)
        bits = words.view(U32 if t == "tf32" else U16).reshape(len(at), at.shape[1], -1)
        return values(np.ascontiguousarray(bits.transpose(0, 2, 1) if flipped else bits), t)


class _Pieces:
    """Each warp as the many lanes that the pieces of its tile need."""

    def __init__(self, w, pieces: int) -> None:
        self.shared, self.rows = w.shared, np.repeat(w.rows.reshape(-1, LANES)[:, 0], pieces)
        self.n = self.rows.size


class Products:
    """The products that lanes have under way, by their accumulators."""

    def __init__(self, n: int) -> None:
        self.committed = np.zeros(n, np.int64)
        self.values: dict[tuple[int, ...], np.ndarray] = {}  # fp32 [accumulators, lanes]
        self.group: dict[tuple[int, ...], np.ndarray] = {}  # of each lane's last product; below 0 for none
        self.checks: list[list] = []  # of each product: lanes that have not waited, their group, and what to check

    def add(self, w, m, accumulators: tuple[int, ...], product, keep: np.ndarray, check: Callable) -> None:
        """keep: where the accumulators are added to, rather than written. check: of lanes [n], when they wait."""
        active = np.ones(w.n, bool) if m is None else m
        before = np.stack([np.broadcast_to(w.registers[i], w.n).view(np.float32) for i in accumulators])
        if accumulators not in self.group:
            self.group[accumulators], self.values[accumulators] = np.full(w.n, -1), before
        before = np.where(self.group[accumulators] >= 0, self.values[accumulators], before)
        self.values[accumulators] = np.where(active, np.where(keep, before, np.float32(0)) + product, before)
        self.group[accumulators] = np.where(active, self.committed, self.group[accumulators])
        for i in accumulators:
            w.registers[i] = np.where(active, np.float32("nan"), np.broadcast_to(w.registers[i], w.n).view(np.float32))
        self.checks.append([active.copy(), self.committed.copy(), check])

    def commit(self, m: np.ndarray | None) -> None:
        self.committed[slice(None) if m is None else m] += 1

    def land(self, w, m: np.ndarray | None, groups: int) -> None:
        """Write the accumulators of all but the last `groups` groups."""
        waiting = np.ones(w.n, bool) if m is None else m
        for accumulators, group in self.group.items():
            due = waiting & (group >= 0) & (group < self.committed - groups)
            if due.any():
                for i, value in zip(accumulators, self.values[accumulators], strict=True):
                    w.registers[i] = np.where(due, value, np.broadcast_to(w.registers[i], w.n).view(np.float32))
                group[due] = -1
        for entry in self.checks:
            lanes, group, check = entry
            due = lanes & waiting & (group < self.committed - groups)
            if due.any():
                check(due)
                lanes &= ~due
        self.checks = [entry for entry in self.checks if entry[0].any()]
