"""Runs a kernel: blocks side by side in one numpy array, warps one after the other in random order.

The lanes of one warp of many blocks form a unit, which runs until all of them wait at a barrier or have returned. Lanes
that stand at the same instruction run together; of several instructions the first is run, so that lanes that diverged
meet again where the branches do. A barrier opens for a block when all of its threads have arrived.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tests.ptx.access import Copies
from tests.ptx.code import Barrier, Branch, Code
from tests.ptx.formats import U32, UNSIGNED
from tests.ptx.memory import POISON, Global, Shared
from tests.ptx.parser import PtxError
from tests.ptx.warp import LANES, whole_warps
from tests.ptx.wgmma import Products

_TOGETHER = 2048  # lanes of a unit, at most: more are no faster per lane, and registers leave the cache


class Launch(NamedTuple):
    """parameters: the bytes of each. seed: None runs all warps of a block in step, which hides missing barriers."""

    code: Code
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    parameters: list[bytes]
    memory: Global
    seed: int | None

    def run(self) -> None:
        """Raises: PtxError, at the first thing that a chip would not do."""
        blocks = np.arange(np.prod(self.grid))
        random = np.random.default_rng(self.seed or 0)
        width = LANES if self.seed is not None else self.threads
        if self.seed is not None:
            random.shuffle(blocks)
        together = max(1, _TOGETHER // width)
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), together):
                _Blocks(self, blocks[first : first + together], width, random).run()


class Lanes:
    """A unit of the same `width` threads of every block, block by block. Builders know it as w."""

    def __init__(self, launch: Launch, shared: Shared, blocks: np.ndarray, first: int, width: int) -> None:
        self.n = len(blocks) * width
        self.registers = [_POISONED[bits] for bits in launch.code.kernel.registers]
        self.memory, self.shared, self.parameters = launch.memory, shared, launch.parameters
        self.rows = np.repeat(np.arange(len(blocks)), width)  # which block's shared memory
        self.copies, self.products = Copies(self.n), Products(self.n)
        thread = np.tile(np.arange(first, first + width), len(blocks))
        self.warp = thread[::LANES] // LANES
        x, y, _ = launch.grid
        block = np.repeat(blocks, width)
        place = {"x": block % x, "y": block // x % y, "z": block // x // y}
        fixed = dict(zip("xyz", launch.grid, strict=True))
        self._special = {
            "%laneid": thread % LANES,
            "%warpid": thread // LANES,
            **{f"%tid.{axis}": thread if axis == "x" else np.zeros(1) for axis in "xyz"},
            **{f"%ntid.{axis}": np.array([launch.threads if axis == "x" else 1]) for axis in "xyz"},
            **{f"%ctaid.{axis}": place[axis] for axis in "xyz"},
            **{f"%nctaid.{axis}": np.array([fixed[axis]]) for axis in "xyz"},
        }
        self.ready: dict[int, np.ndarray] = {0: np.ones(self.n, bool)}  # instruction -> lanes that stand there
        self.waiting: list[tuple[Barrier, int, np.ndarray]] = []  # barrier, instruction behind it, lanes
        self.returned = np.zeros(self.n, bool)

    def special(self, name: str) -> np.ndarray:
        return self._special[name].astype(U32)

    def put(self, at: int, lanes: np.ndarray) -> None:
        self.ready[at] = self.ready[at] | lanes if at in self.ready else lanes

    def run(self, code: Code) -> None:
        """Until no lane is ready."""
        while self.ready:
            at = min(self.ready)
            lanes = self.ready.pop(at)
            self._run(code, at, lanes, min(self.ready, default=len(code.steps)))

    def _run(self, code: Code, at: int, lanes: np.ndarray, stop: int) -> None:
        """Some lanes from one instruction on, until they part, wait, return, or reach `stop`, where others stand."""
        mask = None if lanes.all() else lanes
        while at < stop:
            end = min(code.runs[at], stop)
            for step in code.steps[at:end]:
                step(self, mask)
            at = end
            if at == stop:
                break
            control = code.steps[at]
            if isinstance(control, Barrier):
                whole_warps(mask, control.ins)
                self.waiting.append((control, at + 1, lanes))
                return
            taken = lanes if control.guard is None else control.guard(self) & lanes
            if not taken.any():
                at += 1
                continue
            left = lanes & ~taken
            if isinstance(control, Branch):
                if not left.any():
                    at = control.target
                    continue
                self.put(control.target, taken)
            else:
                self.returned |= taken
            if left.any():
                self.put(at + 1, left)
            return
        self.put(at, lanes)


class _Blocks:
    """Some blocks that run side by side, and know nothing of each other."""

    def __init__(self, launch: Launch, blocks: np.ndarray, width: int, random: np.random.Generator) -> None:
        self.launch, self.count, self.random = launch, len(blocks), random
        self.shared = shared = Shared(len(blocks), launch.shared_bytes, launch.seed is not None)
        self.units = [Lanes(launch, shared, blocks, first, width) for first in range(0, launch.threads, width)]

    def run(self) -> None:
        while True:
            for i in self.random.permutation(len(self.units)):
                if self.shared.races:
                    self.shared.races.warp = i
                self.units[i].run(self.launch.code)
            if not any(unit.waiting for unit in self.units):
                return
            if not self._open_barriers():
                places = {barrier.ins.line for unit in self.units for barrier, _, _ in unit.waiting}
                raise PtxError(f"deadlock: some threads wait at the barriers of PTX lines {sorted(places)} for others")

    def _open_barriers(self) -> bool:
        """Let those blocks go on whose threads have all arrived at one barrier; whether there are any."""
        alive = self.launch.threads - sum(self._per_block(unit.returned) for unit in self.units)
        opened = False
        for number in {barrier.number for unit in self.units for barrier, _, _ in unit.waiting}:
            arrived, wanted = np.zeros(self.count, int), alive.copy()
            for unit in self.units:
                for barrier, _, lanes in unit.waiting:
                    here = self._per_block(lanes) * (barrier.number == number)
                    arrived += here
                    if barrier.threads is not None:
                        wanted[here > 0] = barrier.threads
            opens = (arrived >= wanted) & (arrived > 0)
            opened |= bool(opens.any())
            if self.shared.races:
                self.shared.races.barrier(opens)
            for unit in self.units:
                self._open(unit, number, opens)
        return opened

    def _open(self, unit: Lanes, number: int, opens: np.ndarray) -> None:
        released = opens[unit.rows]
        waiting, unit.waiting = unit.waiting, []
        for barrier, behind, lanes in waiting:
            free = lanes & released if barrier.number == number else np.zeros_like(lanes)
            if free.any():
                unit.put(behind, free)
            if (lanes & ~free).any():
                unit.waiting.append((barrier, behind, lanes & ~free))

    def _per_block(self, lanes: np.ndarray) -> np.ndarray:
        return lanes.reshape(self.count, -1).sum(1)


def _poisoned(bits: int) -> np.ndarray:
    """A register that nothing was written to."""
    return np.ones(1, bool) if bits == 0 else np.full(bits // 8, POISON, np.uint8).view(UNSIGNED[bits])


_POISONED = {bits: _poisoned(bits) for bits in UNSIGNED}


def grid_of(grid: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z
