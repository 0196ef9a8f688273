"""What the lanes of a warp do together: shuffles, reductions, votes, and moving 8 × 8 matrices to and from memory."""

import re
from collections.abc import Callable

import numpy as np

from tests.ptx.access import addresses, load_shared, store_shared
from tests.ptx.formats import DTYPES, U16, U32
from tests.ptx.parser import Immediate, Instruction, Vector

LANES = 32
_LANE = np.arange(LANES)
_SHUFFLE = re.compile(r"shfl\.sync\.(bfly|idx|up|down)\.b32")
_REDUCE = re.compile(r"redux\.sync\.(add|min|max|and|or|xor)\.([usb]32)")
_VOTE = re.compile(r"vote\.sync\.(any\.pred|all\.pred|ballot\.b32)")
_MATRICES = re.compile(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
_REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def build(code, ins: Instruction) -> Callable | None:
    """The step of an instruction of a whole warp, or None if it is not one."""
    if ins.opcode == "bar.warp.sync":
        code.expect(ins, 1)
        return lambda w, m: whole_warps(m, ins)  # lanes of a warp run in step, so this orders nothing here
    if ins.opcode == "fence.proxy.async.shared::cta":
        return _fence(code, ins)
    if match := _SHUFFLE.fullmatch(ins.opcode):
        return _shuffle(code, ins, match[1])
    if match := _REDUCE.fullmatch(ins.opcode):
        return _reduce(code, ins, *match.groups())
    if match := _VOTE.fullmatch(ins.opcode):
        return _vote(code, ins, match[1])
    if match := _MATRICES.fullmatch(ins.opcode):
        build = _load_matrices if match[1] == "ld" else _store_matrices
        return build(code, ins, int(match[2]), match[3] is not None)
    return None


def whole_warps(m: np.ndarray | None, ins: Instruction) -> None:
    """Raises: PtxError, where a warp that should act as one has diverged."""
    if m is not None:
        warps = m.reshape(-1, LANES)
        if (warps.any(1) != warps.all(1)).any():
            raise ins.error("not all lanes of a warp are here")


def by_warp(x: np.ndarray, n: int) -> np.ndarray:
    """[n] or [1] as a contiguous [n / 32, 32]."""
    return np.ascontiguousarray(np.broadcast_to(x, n)).reshape(-1, LANES)


def _fence(code, ins: Instruction) -> Callable:
    """Of lanes that diverged, each would fence its own writes; here a warp is one."""
    code.expect(ins, 0)

    def step(w, m):
        whole_warps(m, ins)
        if w.shared.races:
            w.shared.races.fence(w.rows[::LANES] if m is None else w.rows[m][::LANES])

    return step


def _members(code, ins: Instruction, operand) -> Callable:
    """A function of the lanes that raises PtxError, unless the member mask is all lanes of a warp."""
    mask = code.read(ins, operand, "u32")

    def check(w):
        if (mask(w) != 0xFFFFFFFF).any():
            raise ins.error("a member mask other than all lanes is not known")

    if isinstance(operand, Immediate):
        check(None)
        return lambda w: None
    return check


def _shuffle(code, ins: Instruction, mode: str) -> Callable:
    code.expect(ins, 5)
    check_members = _members(code, ins, ins.operands[4])
    target = ins.operands[0]
    target, inside = target.items if isinstance(target, Vector) else (target, None)
    source, lane, limits = (code.read(ins, o, "b32") for o in ins.operands[1:4])
    write = code.write(ins, target, "b32")
    write_inside = code.write(ins, inside, "pred") if inside else None

    def step(w, m):
        whole_warps(m, ins)
        check_members(w)
        x = by_warp(source(w), w.n)
        b, c = (by_warp(y, w.n).astype(np.int64) for y in (lane(w), limits(w)))
        b, clamp, segment = b & 31, c & 31, (c >> 8) & 31
        first = _LANE & segment
        last = first | (clamp & ~segment)
        if mode == "bfly":
            j = _LANE ^ b
        elif mode == "idx":
            j = first | (b & ~segment)
        else:
            j = _LANE - b if mode == "up" else _LANE + b
        valid = j >= last if mode == "up" else j <= last
        write(w, m, np.take_along_axis(x, np.where(valid, j, _LANE), 1).reshape(-1))
        if write_inside:
            write_inside(w, m, valid.reshape(-1))

    simple = mode == "bfly" and isinstance(ins.operands[2], Immediate) and ins.operands[3] == Immediate(31)
    if not simple or inside:
        return step
    partner = _LANE ^ ins.operands[2].value

    def butterfly(w, m):
        whole_warps(m, ins)
        check_members(w)
        write(w, m, by_warp(source(w), w.n)[:, partner].reshape(-1))

    return butterfly


def _reduce(code, ins: Instruction, name: str, t: str) -> Callable:
    code.expect(ins, 3)
    if (name in ("and", "or", "xor")) != (t == "b32"):
        raise ins.error("instruction not known")
    check_members = _members(code, ins, ins.operands[2])
    read, write, reduce = code.read(ins, ins.operands[1], t), code.write(ins, ins.operands[0], t), _REDUCTIONS[name]

    def step(w, m):
        whole_warps(m, ins)
        check_members(w)
        write(w, m, np.repeat(reduce.reduce(by_warp(read(w), w.n), 1, dtype=DTYPES[t]), LANES))

    return step


def _vote(code, ins: Instruction, kind: str) -> Callable:
    code.expect(ins, 3)
    check_members = _members(code, ins, ins.operands[2])
    read, write = code.read(ins, ins.operands[1], "pred"), code.write(ins, ins.operands[0], kind.split(".")[1])

    def step(w, m):
        whole_warps(m, ins)
        check_members(w)
        x = by_warp(read(w), w.n)
        if kind == "ballot.b32":
            result = np.packbits(x, 1, bitorder="little").view(U32).reshape(-1)
        else:
            result = x.any(1) if kind == "any.pred" else x.all(1)
        write(w, m, np.repeat(result, LANES))

    return step


def _rows(code, ins: Instruction, operand, count: int) -> Callable:
    """Addresses [warps, count, 8] of the rows of each matrix, which the lanes hold one after the other."""
    read = addresses(code, ins, operand, "shared")
    return lambda w: by_warp(read(w), w.n)[:, : 8 * count]


def _row_mask(m: np.ndarray | None, count: int) -> np.ndarray | None:
    return None if m is None else m.reshape(-1, LANES)[:, : 8 * count].reshape(-1)


class _RowLanes:
    """Lanes as the 8 · count lanes of each warp that hold addresses of rows."""

    def __init__(self, w, count: int) -> None:
        self.rows = w.rows.reshape(-1, LANES)[:, : 8 * count].reshape(-1)
        self.shared, self.n = w.shared, self.rows.size


def _load_matrices(code, ins: Instruction, count: int, transposed: bool) -> Callable:
    code.expect(ins, 2)
    rows = _rows(code, ins, ins.operands[1], count)
    items = ins.operands[0].items if isinstance(ins.operands[0], Vector) else (ins.operands[0],)
    if len(items) != count:
        raise ins.error(f"expected {count} registers, got {len(items)}")
    writes = [code.write(ins, item, "b32") for item in items]

    def step(w, m):
        whole_warps(m, ins)
        lanes = _RowLanes(w, count)
        words = load_shared(lanes, rows(w).reshape(-1), _row_mask(m, count), 16, ins)
        matrices = words.view(U16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.transpose(0, 1, 3, 2))
        registers = matrices.view(U32).reshape(-1, count, LANES)
        for i, write in enumerate(writes):
            write(w, m, registers[:, i].reshape(-1))

    return step


def _store_matrices(code, ins: Instruction, count: int, transposed: bool) -> Callable:
    code.expect(ins, 2)
    rows = _rows(code, ins, ins.operands[0], count)
    items = ins.operands[1].items if isinstance(ins.operands[1], Vector) else (ins.operands[1],)
    if len(items) != count:
        raise ins.error(f"expected {count} registers, got {len(items)}")
    reads = [code.read(ins, item, "b32") for item in items]

    def step(w, m):
        whole_warps(m, ins)
        registers = np.stack([by_warp(read(w), w.n) for read in reads], 1)  # [warps, count, 32]
        matrices = registers.view(U16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        values = np.ascontiguousarray(matrices).view(np.complex128).reshape(-1)
        store_shared(_RowLanes(w, count), rows(w).reshape(-1), values, _row_mask(m, count), ins)

    return step
