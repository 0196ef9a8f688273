"""Integer, bit and predicate instructions. Arithmetic wraps, as numpy's does."""

import numpy as np

from tests.ptx.elementwise import comparisons, define, define_comparison
from tests.ptx.formats import DTYPES, U32, U64


def _integers() -> None:
    for bits in (16, 32, 64):
        for sign in "us":
            t = f"{sign}{bits}"
            two = (t, t)
            for name, function in (("add", np.add), ("sub", np.subtract), ("mul.lo", np.multiply)):
                define(f"{name}.{t}", t, two, function)
            for name, function in (("min", np.minimum), ("max", np.maximum)):
                define(f"{name}.{t}", t, two, function)
            define(f"mad.lo.{t}", t, (t, t, t), lambda a, b, c: a * b + c)
            define(f"div.{t}", t, two, lambda a, b: _divide(a, b)[0])
            define(f"rem.{t}", t, two, lambda a, b: _divide(a, b)[1])
            define(f"shr.{t}", t, (t, "u32"), _shift_right)
            unsigned = comparisons("lo", "ls", "hi", "hs") if sign == "u" else {}
            for name, function in (comparisons() | unsigned).items():
                define_comparison(name, t, function)
        define(f"neg.s{bits}", f"s{bits}", (f"s{bits}",), np.negative)
        define(f"abs.s{bits}", f"s{bits}", (f"s{bits}",), np.abs)
        b = f"b{bits}"
        for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
            define(f"{name}.{b}", b, (b, b), function)
        define(f"not.{b}", b, (b,), np.invert)
        define(f"shl.{b}", b, (b, "u32"), _shift_left)
        define(f"shr.{b}", b, (b, "u32"), _shift_right)
        for name, function in (("eq", np.equal), ("ne", np.not_equal)):
            define_comparison(name, b, function)
    for small, large in (("16", "32"), ("32", "64")):
        for sign in "us":
            s, t, dtype = sign + small, sign + large, DTYPES[sign + large]
            define(f"mul.wide.{s}", t, (s, s), lambda a, b, d=dtype: a.astype(d) * b)
            define(f"mad.wide.{s}", t, (s, s, t), lambda a, b, c, d=dtype: a.astype(d) * b + c)
    for t, wide in (("u32", U64), ("s32", DTYPES["s64"])):
        high = np.array(32, wide)
        define(f"mul.hi.{t}", t, (t, t), lambda a, b, w=wide, h=high: ((a.astype(w) * b) >> h).astype(a.dtype))
    for bits in (32, 64):
        for sign in "us":
            t = f"{sign}{bits}"
            define(f"bfe.{t}", t, (t, "u32", "u32"), _bfe)
        define(f"bfi.b{bits}", f"b{bits}", (f"b{bits}", f"b{bits}", "u32", "u32"), _bfi)
    define("popc.b32", "u32", ("b32",), lambda a: np.bitwise_count(a).astype(U32))
    define("brev.b32", "b32", ("b32",), _reversed)
    define("bfind.shiftamt.u32", "u32", ("u32",), _leading_zeros)
    define("prmt.b32", "b32", ("b32", "b32", "b32"), _prmt)
    define("lop3.b32", "b32", ("b32", "b32", "b32", "u32"), _lop3)
    for side in "lr":
        for mode in ("wrap", "clamp"):
            define(
                f"shf.{side}.{mode}.b32",
                "b32",
                ("b32", "b32", "u32"),
                lambda a, b, c, s=side, m=mode: _funnel(a, b, c, s, m),
            )


def _predicates() -> None:
    for name, function in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        define(f"{name}.pred", "pred", ("pred", "pred"), function)
    define("not.pred", "pred", ("pred",), np.logical_not)
    for t in ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64"):
        define(f"selp.{t}", t, (t, t, "pred"), lambda a, b, p: np.where(p, a, b))


def _divide(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quotient toward zero, and remainder. Division by zero is undefined: all bits set, which no test expects."""
    quotient = np.where(b == 0, np.array(-1).astype(a.dtype), a // np.where(b == 0, 1, b).astype(a.dtype))
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)
    return quotient, a - quotient * b


def _shift_left(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    bits = a.dtype.itemsize * 8
    return np.where(count >= bits, a.dtype.type(0), a << np.minimum(count, bits - 1).astype(a.dtype))


def _shift_right(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    """With copies of the sign where signed; a shift by all bits or more leaves those, or zero."""
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count >= bits, a.dtype.type(0), shifted)


def _bfe(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Bits from `position` on. Those behind the operand's end and the result's upper ones repeat the sign, or are 0."""
    bits = a.dtype.itemsize * 8
    position, length = position & 0xFF, length & 0xFF
    end = np.minimum(position + length, bits)
    shifted = _shift_right(_shift_left(a, bits - end), bits - end + position)
    return np.where((length == 0) | ((position >= bits) & (a.dtype.kind == "u")), a.dtype.type(0), shifted)


def _bfi(source: np.ndarray, target: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    ones = _shift_left(~source.dtype.type(0) + np.zeros_like(source), length & 0xFF)
    mask = _shift_left(~ones, position & 0xFF)
    return (target & ~mask) | (_shift_left(source, position & 0xFF) & mask)


def _reversed(a: np.ndarray) -> np.ndarray:
    result = np.zeros(1, U32)
    for i in range(32):
        result = result | ((a >> np.uint32(i) & np.uint32(1)) << np.uint32(31 - i))
    return result


def _leading_zeros(a: np.ndarray) -> np.ndarray:
    """Of 0 all bits set: there is no bit to find."""
    zeros = 31 - np.floor(np.log2(np.maximum(a, 1).astype(np.float64)))
    return np.where(a == 0, np.uint32(0xFFFFFFFF), zeros.astype(U32))


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = a.astype(U64) | (b.astype(U64) << np.uint64(32))
    result = np.zeros(1, U32)
    for i in range(4):
        control = (selector >> np.uint32(4 * i)) & np.uint32(0xF)
        byte = ((both >> ((control & np.uint32(7)).astype(U64) * np.uint64(8))) & np.uint64(0xFF)).astype(U32)
        sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        result = result | (np.where(control & np.uint32(8), sign, byte) << np.uint32(8 * i))
    return result


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    result = np.zeros(1, U32)
    for i in range(8):
        term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        result = result | (term & np.where((table >> np.uint32(i)) & np.uint32(1), np.uint32(0xFFFFFFFF), np.uint32(0)))
    return result


def _funnel(low: np.ndarray, high: np.ndarray, count: np.ndarray, side: str, mode: str) -> np.ndarray:
    count = (count & np.uint32(31) if mode == "wrap" else np.minimum(count, 32)).astype(U64)
    both = low.astype(U64) | (high.astype(U64) << np.uint64(32))
    return (both >> count if side == "r" else (both << count) >> np.uint64(32)).astype(U32)


_integers()
_predicates()
