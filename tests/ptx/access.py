"""ld, st and cp.async as steps: functions of the lanes that run and of the mask of those that are active.

A step gets mask None where all lanes are active, as nearly always, and then takes the short way.
"""

import re
from collections.abc import Callable

import numpy as np

from tests.ptx.formats import DTYPES, UNSIGNED
from tests.ptx.memory import PARAMETER_BITS, POISON, SHARED_BASE
from tests.ptx.parser import Address, Immediate, Instruction, Register, Symbol, Vector

_CACHE = (
    r"(?:\.(?:nc|ca|cg|cs|lu|cv|wb|wt|L1::(?:evict_(?:first|last|normal|unchanged)|no_allocate)|L2::(?:64|128|256)B))*"
)
_ACCESS = re.compile(rf"(ld|st)\.(global|shared|shared::cta)({_CACHE})(\.v[24])?\.([busf](?:8|16|32|64))")
_PARAMETER = re.compile(r"ld\.param(\.v[24])?\.([busf](?:8|16|32|64))")
_COPY = re.compile(r"cp\.async\.(ca|cg)\.shared\.global(?:\.L2::(?:64|128|256)B)?")


def build(code, ins: Instruction) -> Callable | None:
    """The step of a memory instruction, or None if it is not one. code: the `Code` that asks."""
    if match := _PARAMETER.fullmatch(ins.opcode):
        return _parameter(code, ins, int(match[1][2:]) if match[1] else 1, match[2])
    if match := _ACCESS.fullmatch(ins.opcode):
        kind, space, _, many, t = match.groups()
        build = _load if kind == "ld" else _store
        return build(code, ins, space[:6], int(many[2:]) if many else 1, t)
    if match := _COPY.fullmatch(ins.opcode):
        return _copy(code, ins, match[1])
    if ins.opcode == "cp.async.commit_group":
        code.expect(ins, 0)
        return lambda w, m: w.copies.commit(m)
    if ins.opcode in ("cp.async.wait_group", "cp.async.wait_all"):
        return _wait(code, ins)
    return None


def addresses(code, ins: Instruction, operand, space: str) -> Callable:
    """A function of the lanes that gives int64 addresses, in arrays of one element where all lanes share it."""
    if not isinstance(operand, Address):
        raise ins.error(f"operand {operand} is not an address")
    base, offset = operand
    if isinstance(base, Symbol):
        if space != "shared" or base.name not in code.kernel.shared:
            raise ins.error(f"{base.name} does not name {space} memory")
        at = np.array([SHARED_BASE + code.kernel.shared[base.name] + offset])
        return lambda w: at
    if isinstance(base, Immediate):
        raise ins.error("an address must be in a register")
    read = code.read(ins, base, "s64" if space == "global" else "u32")
    if space == "shared":
        return lambda w: read(w).astype(np.int64) + offset
    return (lambda w: read(w) + offset) if offset else read


def load_shared(w, at: np.ndarray, m: np.ndarray | None, size: int, ins: Instruction) -> np.ndarray:
    """[n] words at addresses [n] or [1]; poison in lanes that are not active."""
    if m is None:
        return w.shared.load(at, w.rows, size, ins)
    at = np.broadcast_to(at, w.n)[m]
    return _spread(w.shared.load(at, w.rows[m], size, ins), m)


def store_shared(w, at: np.ndarray, values: np.ndarray, m: np.ndarray | None, ins: Instruction) -> None:
    if m is None:
        w.shared.store(at, w.rows, values, ins)
    else:
        at, values = np.broadcast_to(at, w.n)[m], np.broadcast_to(values, w.n)[m]
        w.shared.store(at, w.rows[m], values, ins)


def _load_global(w, at: np.ndarray, m: np.ndarray | None, size: int, ins: Instruction) -> np.ndarray:
    if m is None:
        return w.memory.load(at, size, ins)
    return _spread(w.memory.load(np.broadcast_to(at, w.n)[m], size, ins), m)


def _store_global(w, at: np.ndarray, values: np.ndarray, m: np.ndarray | None, ins: Instruction) -> None:
    at, values = np.broadcast_to(at, w.n), np.broadcast_to(values, w.n)
    w.memory.store(*((at, values) if m is None else (at[m], values[m])), ins)


def _spread(values: np.ndarray, m: np.ndarray) -> np.ndarray:
    result = np.full(m.size * values.dtype.itemsize, POISON, np.uint8).view(values.dtype)
    result[m] = values
    return result


def _items(operand, count: int, ins: Instruction) -> tuple:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if len(items) != count:
        raise ins.error(f"expected {count} registers, got {len(items)}")
    return items


def _load(code, ins: Instruction, space: str, count: int, t: str) -> Callable:
    code.expect(ins, 2)
    dtype = DTYPES[t]
    at, size = addresses(code, ins, ins.operands[1], space), count * dtype.itemsize
    load = load_shared if space == "shared" else _load_global
    write = [code.write_extended(ins, item, t) for item in _items(ins.operands[0], count, ins)]
    if count == 1:
        (write_one,) = write
        return lambda w, m: write_one(w, m, load(w, at(w), m, size, ins).view(dtype))

    def step(w, m):
        words = load(w, at(w), m, size, ins).view(dtype).reshape(-1, count)
        for i, write_item in enumerate(write):
            write_item(w, m, words[:, i])

    return step


def _store(code, ins: Instruction, space: str, count: int, t: str) -> Callable:
    code.expect(ins, 2)
    t = f"b{t[1:]}"  # bits are moved, and never converted to the dtype of memory
    dtype = DTYPES[t]
    at = addresses(code, ins, ins.operands[0], space)
    store = store_shared if space == "shared" else _store_global
    read = [code.read(ins, item, t, narrow=True) for item in _items(ins.operands[1], count, ins)]
    if count == 1:
        (read_one,) = read
        return lambda w, m: store(w, at(w), read_one(w), m, ins)
    word = UNSIGNED[8 * count * dtype.itemsize] if count * dtype.itemsize < 16 else np.dtype(np.complex128)

    def step(w, m):
        values = np.empty((w.n, count), dtype)
        for i, read_item in enumerate(read):
            values[:, i] = read_item(w)
        store(w, at(w), values.view(word).reshape(-1), m, ins)

    return step


def _parameter(code, ins: Instruction, count: int, t: str) -> Callable:
    """At a parameter's name and an offset, or at an address that was computed from that of the name."""
    code.expect(ins, 2)
    base, offset = ins.operands[1]
    dtype = DTYPES[t]
    size = count * dtype.itemsize
    if isinstance(base, Symbol) and base.name in code.parameters:
        start = np.array([code.parameters[base.name] << PARAMETER_BITS])
        at = lambda w: start  # noqa: E731
    elif isinstance(base, Register):
        at = code.read(ins, base, "s64")
    else:
        raise ins.error("no such parameter")
    writes = [code.write_extended(ins, item, t) for item in _items(ins.operands[0], count, ins)]

    def load(w, address: int) -> np.ndarray:
        number, place = divmod(address, 1 << PARAMETER_BITS)
        if not 0 <= number < len(w.parameters) or place + size > len(w.parameters[number]):
            raise ins.error(f"{size} bytes at byte {place} of parameter {number}, which does not have them")
        if place % size:
            raise ins.error(f"misaligned access of {size} bytes at byte {place} of a parameter")
        return np.frombuffer(w.parameters[number], dtype, count, place)

    def step(w, m):
        addresses = np.broadcast_to(at(w) + offset, w.n)
        wanted = addresses if m is None else addresses[m]
        found, which = np.unique(wanted, return_inverse=True)
        words = np.stack([load(w, int(address)) for address in found])
        for i, write in enumerate(writes):
            if len(found) == 1:
                write(w, m, words[:, i])
            else:
                values = words[which, i]
                write(w, m, values if m is None else _spread(values, m))

    return step


def _copy(code, ins: Instruction, cache: str) -> Callable:
    """cp.async: bytes from global to shared memory, or zeros where the optional source size is 0."""
    code.expect(ins, 3, 4)
    target, source = (addresses(code, ins, o, s) for o, s in zip(ins.operands[:2], ("shared", "global"), strict=True))
    size = ins.operands[2].value if isinstance(ins.operands[2], Immediate) else None
    if size not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise ins.error("a copy must be of 4, 8 or 16 bytes, and of 16 with cg")
    length = code.read(ins, ins.operands[3], "u32") if len(ins.operands) == 4 else None

    def step(w, m):
        active = np.ones(w.n, bool) if m is None else m
        real = active
        if length is not None:
            wanted = length(w)
            real = active & (wanted != 0)
            if (active & (wanted != 0) & (wanted != size)).any():
                raise ins.error("a source size other than 0 and the whole is not known")
        at = np.broadcast_to(target(w), w.n)
        values = np.zeros(w.n * size, np.uint8).view(UNSIGNED[size * 8] if size < 16 else np.complex128)
        if real.any():
            values[real] = w.memory.load(np.broadcast_to(source(w), w.n)[real], size, ins)
        lanes = np.flatnonzero(active)
        poison = np.full(lanes.size * size, POISON, np.uint8).view(values.dtype)
        w.shared.store(at[lanes], w.rows[lanes], poison, ins)
        w.copies.add(lanes, at[lanes], values[lanes], ins)

    return step


def _wait(code, ins: Instruction) -> Callable:
    every = ins.opcode.endswith("all")
    code.expect(ins, 0 if every else 1)
    if every:
        return lambda w, m: w.copies.land(w, m, None)
    if not isinstance(ins.operands[0], Immediate):
        raise ins.error("the number of groups must be a constant")
    return lambda w, m: w.copies.land(w, m, ins.operands[0].value)


class Copies:
    """The copies that lanes have under way. Each lane commits and waits for its own, so each has its own count."""

    def __init__(self, n: int) -> None:
        self.committed = np.zeros(n, np.int64)
        self.pending: list[tuple] = []

    def add(self, lanes: np.ndarray, at: np.ndarray, values: np.ndarray, ins: Instruction) -> None:
        if lanes.size:
            self.pending.append((lanes, self.committed[lanes], at, values, ins))

    def commit(self, m: np.ndarray | None) -> None:
        self.committed[slice(None) if m is None else m] += 1

    def land(self, w, m: np.ndarray | None, groups: int | None) -> None:
        """Write what all but the last `groups` groups copy; with None, also what is not committed."""
        left = []
        for lanes, group, at, values, ins in self.pending:
            due = np.ones(lanes.size, bool) if groups is None else group < self.committed[lanes] - groups
            if m is not None:
                due &= m[lanes]
            if due.any():
                w.shared.store(at[due], w.rows[lanes[due]], values[due], ins)
            if not due.all():
                rest = ~due
                left.append((lanes[rest], group[rest], at[rest], values[rest], ins))
        self.pending = left
