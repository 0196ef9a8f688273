"""A kernel's instructions as steps: Python functions of the lanes that run, built once per kernel.

Here are the operands and the elementwise instructions; access.py, warp.py and matrix.py build the others. What none of
them knows raises when the kernel is parsed, whether or not it would ever run.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tests.ptx import access, conversions, floats, integers, matrix, warp, wgmma  # noqa: F401  some only fill OPS
from tests.ptx.elementwise import OPS
from tests.ptx.formats import DTYPES, F32, F64, SIGNED, UNSIGNED
from tests.ptx.memory import PARAMETER_BITS, SHARED_BASE
from tests.ptx.parser import Immediate, Instruction, Kernel, Register, Symbol, Vector

_BUILDERS = (access.build, warp.build, matrix.build, wgmma.build)


class Branch(NamedTuple):
    target: int
    guard: Callable | None


class Barrier(NamedTuple):
    """threads: how many it waits for; None for all of the block."""

    number: int
    threads: int | None
    ins: Instruction


class Return(NamedTuple):
    guard: Callable | None


class Code:
    """steps: for each instruction a function of (lanes, mask), or a Branch, Barrier or Return."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.parameters = {parameter.name: i for i, parameter in enumerate(kernel.parameters)}
        self.steps = [self._build(ins) for ins in kernel.instructions]
        self.steps.append(Return(None))  # a kernel may end without one
        control = len(self.steps)
        self.runs = [0] * len(self.steps)  # for each instruction, where the straight run that it is in ends
        for i in reversed(range(len(self.steps))):
            control = control if callable(self.steps[i]) else i
            self.runs[i] = control

    def expect(self, ins: Instruction, *counts: int) -> None:
        """Raises: PtxError, unless the instruction has one of these numbers of operands."""
        if len(ins.operands) not in counts:
            raise ins.error(f"expected {' or '.join(map(str, counts))} operands, got {len(ins.operands)}")

    def read(self, ins: Instruction, operand, t: str, narrow: bool = False) -> Callable:
        """A function of the lanes: the operand as an array [n], or [1] if all lanes share it, of type t.

        narrow: a register may have more bits than t, whose lowest are taken.
        """
        dtype = DTYPES[t]
        bits = 0 if t == "pred" else dtype.itemsize * 8
        if isinstance(operand, Immediate):
            value = _constant(ins, operand, dtype)
            return lambda w: value
        if isinstance(operand, Symbol):
            return self._symbol(ins, operand, t)
        if not isinstance(operand, Register):
            raise ins.error(f"operand {operand} cannot be read as {t}")
        i, width = operand
        if narrow and width > bits > 0:
            return lambda w, wide=UNSIGNED[width], u=UNSIGNED[bits]: w.registers[i].view(wide).astype(u).view(dtype)
        if width != bits:
            raise ins.error(f"a register of {width} bits where {t} is read")

        def read(w):
            value = w.registers[i]
            return value if value.dtype is dtype else value.view(dtype)

        return read

    def write(self, ins: Instruction, operand, t: str) -> Callable:
        """A function of (lanes, mask, value of type t) that writes a register where the mask is set."""
        if operand == Symbol("_"):
            return lambda w, m, value: None
        bits = 0 if t == "pred" else DTYPES[t].itemsize * 8
        if not isinstance(operand, Register) or operand.width != bits:
            raise ins.error(f"operand {operand} cannot hold {t}")
        i = operand.index

        def write(w, m, value):
            w.registers[i] = value if m is None else merge(m, value, w.registers[i])

        return write

    def write_extended(self, ins: Instruction, operand, t: str) -> Callable:
        """As write, into a register that may be larger: filled with the sign if t has one, else with zeros."""
        bits = DTYPES[t].itemsize * 8
        if not isinstance(operand, Register) or operand.width <= bits:
            return self.write(ins, operand, t)
        write = self.write(ins, operand, f"b{operand.width}")
        small, large = (SIGNED if t[0] == "s" else UNSIGNED)[bits], (SIGNED if t[0] == "s" else UNSIGNED)[operand.width]
        return lambda w, m, value: write(w, m, value.view(small).astype(large))

    def _symbol(self, ins: Instruction, symbol: Symbol, t: str) -> Callable:
        dtype = DTYPES[t]
        if symbol.name in self.kernel.shared and t in ("b32", "u32", "b64", "u64"):
            at = np.array([SHARED_BASE + self.kernel.shared[symbol.name]], dtype)
            return lambda w: at
        if symbol.name in self.parameters and t in ("b64", "u64"):
            address = np.array([self.parameters[symbol.name] << PARAMETER_BITS], dtype)
            return lambda w: address
        if symbol.name.startswith("%") and t in ("b32", "u32", "s32"):
            return lambda w: w.special(symbol.name).view(dtype)
        raise ins.error(f"{symbol.name} cannot be read as {t}")

    def _build(self, ins: Instruction) -> Callable | Branch | Barrier | Return:
        guard = None
        if ins.guard:
            read = self.read(ins, ins.guard[0], "pred")
            guard = (lambda w: ~read(w)) if ins.guard[1] else read
        if ins.opcode in ("bra", "bra.uni"):
            self.expect(ins, 1)
            if not isinstance(ins.operands[0], Symbol) or ins.operands[0].name not in self.kernel.labels:
                raise ins.error("no such label")
            return Branch(self.kernel.labels[ins.operands[0].name], guard)
        if ins.opcode in ("ret", "exit"):
            self.expect(ins, 0)
            return Return(guard)
        if ins.opcode in ("bar.sync", "barrier.sync.aligned"):
            return self._barrier(ins)
        step = self._elementwise(ins) or self._move(ins)
        for build in _BUILDERS:
            step = step or build(self, ins)
        if step is None:
            raise ins.error("instruction not known, or not with these operands")
        return _guarded(step, guard) if guard else step

    def _barrier(self, ins: Instruction) -> Barrier:
        self.expect(ins, 1, 2)
        if ins.guard or not all(isinstance(operand, Immediate) for operand in ins.operands):
            raise ins.error("a guarded barrier, or one whose operands are not constant, is not known")
        number, *threads = (operand.value for operand in ins.operands)
        return Barrier(number, threads[0] if threads else None, ins)

    def _elementwise(self, ins: Instruction) -> Callable | None:
        op = OPS.get((ins.opcode, len(ins.operands) - 1))
        if op is None:
            return None
        target, *sources = ins.operands
        reads = [self.read(ins, source, t, op.narrow) for source, t in zip(sources, op.operands, strict=True)]
        if op.result == "pred|pred":
            if not isinstance(target, Vector) or len(target.items) != 2:
                raise ins.error("expected two predicates")
            low, high = (self.write(ins, item, "pred") for item in target.items)
            return _compute(op.function, reads, lambda w, m, both: (low(w, m, both[0]), high(w, m, both[1])))
        write = self.write_extended if op.narrow else self.write
        return _compute(op.function, reads, write(ins, target, op.result))

    def _move(self, ins: Instruction) -> Callable | None:
        """mov: between registers, of a constant, or of a register's parts."""
        kind, _, t = ins.opcode.partition(".")
        if kind != "mov" or t not in ("pred", "b16", "b32", "b64", "u16", "u32", "u64", "s32", "s64", "f32", "f64"):
            return None
        self.expect(ins, 2)
        target, source = ins.operands
        if isinstance(target, Vector) and isinstance(source, Vector):
            return None
        if isinstance(source, Vector):
            part = f"b{DTYPES[t].itemsize * 8 // len(source.items)}"
            reads, write = [self.read(ins, item, part) for item in source.items], self.write(ins, target, t)
            return lambda w, m: write(w, m, _join([read(w) for read in reads], DTYPES[t]))
        read = self.read(ins, source, t)
        if not isinstance(target, Vector):
            write = self.write(ins, target, t)
            return lambda w, m: write(w, m, read(w))
        count = len(target.items)
        part = DTYPES[f"b{DTYPES[t].itemsize * 8 // count}"]
        writes = [self.write(ins, item, f"b{part.itemsize * 8}") for item in target.items]

        def split(w, m):
            parts = np.ascontiguousarray(read(w)).view(part).reshape(-1, count)
            for i, write_part in enumerate(writes):
                write_part(w, m, parts[:, i])

        return split


def merge(m: np.ndarray, value: np.ndarray, before: np.ndarray) -> np.ndarray:
    return np.where(m, value, before if before.dtype is value.dtype else before.view(value.dtype))


def _constant(ins: Instruction, operand: Immediate, dtype: np.dtype) -> np.ndarray:
    bits = dtype.itemsize * 8
    if dtype == np.bool_:
        return np.array([operand.value != 0])
    if operand.kind != "int":
        of = F32 if operand.kind == "f32" else F64
        if of.itemsize * 8 != bits:
            raise ins.error(f"a constant of type {operand.kind} where {dtype} is read")
        return np.array([operand.value], UNSIGNED[bits]).view(dtype)
    if dtype.kind == "f" or not -(1 << bits - 1) <= operand.value < 1 << bits:
        raise ins.error(f"constant {operand.value} where {dtype} is read")
    return np.array([operand.value % (1 << bits)], UNSIGNED[bits]).view(dtype)


def _compute(function: Callable, reads: list[Callable], write: Callable) -> Callable:
    if len(reads) == 1:
        (a,) = reads
        return lambda w, m: write(w, m, function(a(w)))
    if len(reads) == 2:
        a, b = reads
        return lambda w, m: write(w, m, function(a(w), b(w)))
    if len(reads) == 3:
        a, b, c = reads
        return lambda w, m: write(w, m, function(a(w), b(w), c(w)))
    return lambda w, m: write(w, m, function(*[read(w) for read in reads]))


def _join(parts: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    parts = np.broadcast_arrays(*parts)
    return np.stack(parts, 1).view(dtype).reshape(-1)


def _guarded(step: Callable, guard: Callable) -> Callable:
    def guarded(w, m):
        active = guard(w) if m is None else guard(w) & m
        if active.size != w.n:  # all lanes share the predicate
            active = np.broadcast_to(active, w.n)
        if active.all():
            step(w, None)
        elif active.any():
            step(w, active)

    return guarded
