"""Floating point: fp32 and fp64, packed pairs of fp32, fp16 and bf16, and what a chip only approximates.

No result is flushed to zero unless .ftz says so. Approximations are numpy's exact functions, but for tanh, whose error
on the chip is large enough to matter.
"""

from collections.abc import Callable

import numpy as np

from tests.ptx.elementwise import comparisons, define, define_comparison
from tests.ptx.formats import F32, F64, U16, U32, U64, bf16_to_f32, f32_to_bf16, flush, halves, whole

_ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_EXTREMES = {"min": np.fmin, "max": np.fmax, "min.NaN": np.minimum, "max.NaN": np.maximum}  # a NaN loses but for .NaN
_APPROXIMATE = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
}


def _single() -> None:
    one = {"neg": np.negative, "abs": np.abs, "sqrt.rn": np.sqrt, "rcp.rn": np.reciprocal, "tanh.approx": _tanh}
    one |= {f"{name}.approx": function for name, function in _APPROXIMATE.items()}
    two = _ARITHMETIC | _EXTREMES | {f"div.{kind}": np.divide for kind in ("rn", "full", "approx")}
    two |= {f"{name}.rn": function for name, function in _ARITHMETIC.items()}
    three = {name: lambda a, b, c, f=function: f(f(a, b), c) for name, function in _EXTREMES.items()}  # sm_100 and on
    three |= {"fma.rn": _fma, "fma.rm": _fma_down}
    define("copysign.f32", "f32", ("f32", "f32"), lambda sign, x: np.copysign(x, sign))
    for count, functions in ((1, one), (2, two), (3, three)):
        for name, function in functions.items():
            define(f"{name}.f32", "f32", ("f32",) * count, function)
            define(f"{name}.ftz.f32", "f32", ("f32",) * count, _flushed(function))
    for name, function in _ordered().items():
        define_comparison(name, "f32", function)
        define(f"setp.{name}.ftz.f32", "pred", ("f32", "f32"), _of_flushed(function))


def _double() -> None:
    two = ("f64", "f64")
    for name, function in _ARITHMETIC.items():
        define(f"{name}.f64", "f64", two, function)
        define(f"{name}.rn.f64", "f64", two, function)
    for name in ("min", "max"):
        define(f"{name}.f64", "f64", two, _EXTREMES[name])
    define("div.rn.f64", "f64", two, np.divide)
    define("fma.rn.f64", "f64", ("f64",) * 3, lambda a, b, c: a * b + c)  # rounded twice
    for name, function in (("neg", np.negative), ("abs", np.abs), ("sqrt.rn", np.sqrt), ("rcp.rn", np.reciprocal)):
        define(f"{name}.f64", "f64", ("f64",), function)
    for name, function in _ordered().items():
        define_comparison(name, "f64", function)


def _packed_and_mixed() -> None:
    """From sm_100 on: pairs of fp32, and fp32 with a narrow operand."""
    for name, function in _ARITHMETIC.items():
        for rounding in ("", ".rn"):
            define(f"{name}{rounding}.f32x2", "f32x2", ("f32x2",) * 2, _pairs(function))
    define("fma.rn.f32x2", "f32x2", ("f32x2",) * 3, _pairs(_fma))
    for t, widen in (("f16", lambda x: x.astype(F32)), ("bf16", bf16_to_f32)):
        for name in ("add", "sub"):
            for rounding in ("", ".rn"):
                mixed = lambda a, c, f=_ARITHMETIC[name], w=widen: f(w(a), c)  # noqa: E731
                define(f"{name}{rounding}.f32.{t}", "f32", (t, "f32"), mixed)
        define(f"fma.rn.f32.{t}", "f32", (t, t, "f32"), lambda a, b, c, w=widen: _fma(w(a), w(b), c))


def _half_floats() -> None:
    two = _ARITHMETIC | _EXTREMES | {f"{name}.rn": function for name, function in _ARITHMETIC.items()}
    for t in ("f16", "bf16"):
        for name, function in (two | {"fma.rn": lambda a, b, c: a * b + c}).items():
            count = 3 if name == "fma.rn" else 2
            define(f"{name}.{t}", t, (t,) * count, _half(function, t))
            define(f"{name}.{t}x2", f"{t}x2", (f"{t}x2",) * count, _half_pairs(_half(function, t), t))
        for name, function in (("neg", np.negative), ("abs", np.abs)):
            define(f"{name}.{t}", t, (t,), _half(function, t))
            define(f"{name}.{t}x2", f"{t}x2", (f"{t}x2",), _half_pairs(_half(function, t), t))
        for name, function in _ordered().items():
            wide = _widened(function, t)
            define_comparison(name, t, wide)
            define(f"setp.{name}.{t}x2", "pred|pred", (f"{t}x2",) * 2, _half_pair_predicates(wide, t))


def _ordered() -> dict[str, Callable]:
    """Comparisons of floats: false with a NaN, but for those that end in u."""
    named = comparisons() | {"ne": lambda a, b: (a < b) | (a > b)}
    for name, function in list(named.items()):
        named[f"{name}u"] = lambda a, b, f=function: f(a, b) | np.isnan(a) | np.isnan(b)
    named["num"] = lambda a, b: ~(np.isnan(a) | np.isnan(b))
    named["nan"] = lambda a, b: np.isnan(a) | np.isnan(b)
    return named


def _fma_down(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Rounded toward -inf."""
    product, c = a.astype(F64) * b, c.astype(F64)  # exact
    total = product + c
    back = total - product
    rest = (product - (total - back)) + (c - back)  # what the sum was rounded by
    nearest = total.astype(F32)
    above = (nearest > total) | ((nearest == total) & (rest < 0))
    return np.where(above, np.nextafter(nearest, F32.type(-np.inf)), nearest)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The product is exact in fp64, and so is nearly every sum."""
    return (a.astype(F64) * b + c).astype(F32)


def _flushed(function: Callable) -> Callable:
    return lambda *operands: flush(function(*(flush(x) for x in operands)))


def _of_flushed(function: Callable) -> Callable:
    return lambda *operands: function(*(flush(x) for x in operands))


def _tanh(x: np.ndarray) -> np.ndarray:
    """As rough as the chip's, whose relative error is 2**-11: the last 13 of 23 bits of mantissa are cut off."""
    return (np.tanh(x).view(U32) & np.uint32(0xFFFFE000)).view(F32)


def _pairs(function: Callable) -> Callable:
    return lambda *operands: whole(function(*(halves(x, F32) for x in operands)), U64)


def _widened(function: Callable, t: str) -> Callable:
    widen = bf16_to_f32 if t == "bf16" else lambda x: x.astype(F32)
    return lambda *operands: function(*(widen(x) for x in operands))


def _half_pair_predicates(function: Callable, t: str) -> Callable:
    """Of the lower halves, and of the upper ones."""
    dtype = np.dtype(np.float16) if t == "f16" else U16
    return lambda *operands: function(*(halves(x, dtype) for x in operands)).T


def _half(function: Callable, t: str) -> Callable:
    """Products of halves are exact in fp64, and so are most sums, which are then rounded once."""
    if t == "f16":
        return lambda *operands: function(*(x.astype(F64) for x in operands)).astype(np.float16)
    return lambda *operands: f32_to_bf16(function(*(bf16_to_f32(x).astype(F64) for x in operands)).astype(F32))


def _half_pairs(function: Callable, t: str) -> Callable:
    dtype = np.dtype(np.float16) if t == "f16" else U16
    return lambda *operands: whole(function(*(halves(x, dtype) for x in operands)), U32)


_single()
_double()
_packed_and_mixed()
_half_floats()
