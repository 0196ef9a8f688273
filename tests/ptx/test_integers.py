"""Integer, bit and predicate instructions, against Python's integers."""

import numpy as np
import pytest

from tests.ptx.snippets import compute

RANDOM = np.random.default_rng(0)


def _operand(bits: int, signed: bool) -> np.ndarray:
    """32 values, of which the ends of the range and those beside them are the first."""
    dtype = np.dtype(f"{'i' if signed else 'u'}{bits // 8}")
    limits = np.iinfo(dtype)
    ends = [0, 1, 2, limits.max, limits.max - 1, limits.min, limits.min + 1]
    values = RANDOM.integers(limits.min, limits.max, 32, dtype, endpoint=True)
    values[RANDOM.permutation(32)[: len(ends)]] = ends
    return values


def _wrap(value: int, bits: int, signed: bool) -> int:
    value %= 1 << bits
    return value - (1 << bits) if signed and value >> bits - 1 else value


def _truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": _truncated,
    "rem": lambda a, b: a - _truncated(a, b) * b,
}


@pytest.mark.parametrize("t", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_wraps(name, t):
    signed, bits = t[0] == "s", int(t[1:])
    a, b = _operand(bits, signed), _operand(bits, signed)
    if name in ("div", "rem"):
        b[b == 0] = 3
    got = compute(f"{name}.{t} $d, $0, $1", a.dtype, a, b)
    expected = [_wrap(ARITHMETIC[name](int(x), int(y)), bits, signed) for x, y in zip(a, b, strict=True)]
    assert got.tolist() == expected


@pytest.mark.parametrize("t", ["s32", "u32"])
def test_products_of_twice_the_width(t):
    signed = t[0] == "s"
    a, b = _operand(32, signed), _operand(32, signed)
    c = _operand(64, signed)
    exact = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    assert compute(f"mul.wide.{t} $d, $0, $1", c.dtype, a, b).tolist() == exact
    assert compute(f"mul.hi.{t} $d, $0, $1", a.dtype, a, b).tolist() == [x >> 32 for x in exact]
    sums = [_wrap(x + int(y), 64, signed) for x, y in zip(exact, c, strict=True)]
    assert compute(f"mad.wide.{t} $d, $0, $1, $2", c.dtype, a, b, c).tolist() == sums


@pytest.mark.parametrize("t", ["s32", "u32", "s64", "u64"])
def test_shifts(t):
    """Counts of all bits and more leave zero, or the sign."""
    signed, bits = t[0] == "s", int(t[1:])
    a, count = _operand(bits, signed), RANDOM.integers(0, bits + 9, 32, np.uint32)
    pairs = [(int(x), min(int(c), 99)) for x, c in zip(a, count, strict=True)]
    right, left = (
        compute(f"shr.{t} $d, $0, $1", a.dtype, a, count),
        compute(f"shl.b{bits} $d, $0, $1", a.dtype, a, count),
    )
    assert right.tolist() == [x >> c for x, c in pairs]
    assert left.tolist() == [_wrap(x << c, bits, signed) for x, c in pairs]


@pytest.mark.parametrize(("t", "names"), [("s32", "lt le gt ge"), ("u32", "lt le gt ge lo ls hi hs"), ("s64", "lt ge")])
def test_comparisons(t, names):
    a = _operand(int(t[1:]), t[0] == "s")
    b = np.where(np.arange(32) % 3, a[::-1], a)
    functions = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
    functions |= dict(zip(("lo", "ls", "hi", "hs"), functions.values(), strict=True)) | {
        "eq": np.equal,
        "ne": np.not_equal,
    }
    p = RANDOM.random(32) < 0.5
    for name in [*names.split(), "eq", "ne"]:
        expected = functions[name](a, b)
        assert (compute(f"setp.{name}.{t} $d, $0, $1", np.bool_, a, b) == expected).all(), name
        joined = {"and": expected & p, "or": expected | p, "xor": expected ^ p}
        for join, value in joined.items():
            assert (compute(f"setp.{name}.{join}.{t} $d, $0, $1, $2", np.bool_, a, b, p) == value).all(), (name, join)


def test_select_and_predicates():
    a, b, p, q = _operand(32, True), _operand(32, True), RANDOM.random(32) < 0.5, RANDOM.random(32) < 0.5
    assert (compute("selp.b32 $d, $0, $1, $2", a.dtype, a, b, p) == np.where(p, a, b)).all()
    assert (compute("and.pred $d, $0, $1", np.bool_, p, q) == (p & q)).all()
    assert (compute("xor.pred $d, $0, $1", np.bool_, p, q) == (p ^ q)).all()
    assert (compute("not.pred $d, $0", np.bool_, p) == ~p).all()


@pytest.mark.parametrize("t", ["s32", "u32"])
def test_bit_fields(t):
    """bfe by the pseudocode of the PTX manual; bfi puts a field into another number."""
    signed = t[0] == "s"
    a, target = _operand(32, signed), _operand(32, False)
    position, length = (RANDOM.integers(0, 40, 32, np.uint32) for _ in range(2))
    extracted, inserted = [], []
    for x, y, p, n in zip(a.view(np.uint32).tolist(), target.tolist(), position.tolist(), length.tolist(), strict=True):
        sign = signed and n > 0 and x >> min(p + n - 1, 31) & 1
        bits = [(x >> p + i & 1 if p + i < 32 else sign) if i < n else sign for i in range(32)]
        extracted.append(_wrap(sum(bool(bit) << i for i, bit in enumerate(bits)), 32, signed))
        mask = ((1 << n) - 1 << p) % (1 << 32)
        inserted.append(y & ~mask | x << p & mask)
    assert compute(f"bfe.{t} $d, $0, $1, $2", a.dtype, a, position, length).tolist() == extracted
    assert compute("bfi.b32 $d, $0, $1, $2, $3", np.uint32, a, target, position, length).tolist() == inserted


def test_bytes_and_logic():
    a, b, c = (_operand(32, False) for _ in range(3))
    selector = RANDOM.integers(0, 1 << 16, 32, np.uint32)
    permuted = []
    for x, y, s in zip(a, b, selector, strict=True):
        source = list(int(x).to_bytes(4, "little") + int(y).to_bytes(4, "little"))
        picked = [source[s >> 4 * i & 7] for i in range(4)]
        signs = [s >> 4 * i & 8 for i in range(4)]
        result = [(0xFF if v & 0x80 else 0) if sign else v for v, sign in zip(picked, signs, strict=True)]
        permuted.append(int.from_bytes(result, "little"))
    assert compute("prmt.b32 $d, $0, $1, $2", np.uint32, a, b, selector).tolist() == permuted
    assert (compute("lop3.b32 $d, $0, $1, $2, 0x96", np.uint32, a, b, c) == a ^ b ^ c).all()
    assert (compute("lop3.b32 $d, $0, $1, $2, 0xE8", np.uint32, a, b, c) == a & b | a & c | b & c).all()
    count = RANDOM.integers(0, 32, 32, np.uint32)
    both = [(int(y) << 32 | int(x), int(n)) for x, y, n in zip(a, b, count, strict=True)]
    assert compute("shf.r.wrap.b32 $d, $0, $1, $2", np.uint32, a, b, count).tolist() == [
        (x >> n) % (1 << 32) for x, n in both
    ]
    assert compute("shf.l.wrap.b32 $d, $0, $1, $2", np.uint32, a, b, count).tolist() == [
        (x << n >> 32) % (1 << 32) for x, n in both
    ]
    assert compute("popc.b32 $d, $0", np.uint32, a).tolist() == [int(x).bit_count() for x in a]
    assert (compute("not.b32 $d, $0", np.uint32, a) == ~a).all()


def test_conversions_between_integers():
    a, wide = _operand(32, True), _operand(64, True)
    assert (compute("cvt.s64.s32 $d, $0", np.int64, a) == a).all()
    assert (compute("cvt.u64.u32 $d, $0", np.uint64, a.view(np.uint32)) == a.view(np.uint32)).all()
    assert (compute("cvt.u32.u64 $d, $0", np.uint32, wide.view(np.uint64)) == wide.astype(np.uint32)).all()
    assert (compute("cvt.s32.s8 $d, $0", np.int32, a) == a.astype(np.int8)).all()  # the lowest byte of a register
    assert (compute("cvt.u16.u32 $d, $0", np.uint16, a) == a.astype(np.uint16)).all()


def test_bits_reversed_and_found():
    a = _operand(32, False)
    assert compute("brev.b32 $d, $0", a.dtype, a).tolist() == [int(f"{int(x):032b}"[::-1], 2) for x in a]
    found = [32 - int(x).bit_length() if x else 2**32 - 1 for x in a]
    assert compute("bfind.shiftamt.u32 $d, $0", a.dtype, a).tolist() == found
