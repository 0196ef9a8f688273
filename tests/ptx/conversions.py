"""cvt: between integers (which saturate only on request), from floats to integers, and between the float formats."""

from collections.abc import Callable

import numpy as np

from tests.ptx.elementwise import define
from tests.ptx.formats import (
    DTYPES,
    F32,
    bf16_to_f32,
    f32_to_bf16,
    f32_to_bf16_toward_zero,
    f32_to_tf32_away,
    f32_to_tf32_even,
    pack,
)

_INTEGERS = [f"{sign}{bits}" for sign in "us" for bits in (8, 16, 32, 64)]
_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _cast(dtype: np.dtype) -> Callable:
    return lambda x: x.astype(dtype)


def _to_integer(dtype: np.dtype, round_to: Callable) -> Callable:
    """Out of range it clamps to the nearest integer of the type, and NaN becomes 0."""
    limits = np.iinfo(dtype)

    def convert(x: np.ndarray) -> np.ndarray:
        value = round_to(x.astype(np.float64))
        inside = (value >= limits.min) & (value < float(limits.max))
        clamped = np.where(inside, value, 0).astype(dtype)
        return np.where(
            value >= float(limits.max), limits.max, np.where(value < limits.min, limits.min, clamped)
        ).astype(dtype)

    return convert


def _define(opcode: str, result: str, operands: tuple[str, ...], function: Callable) -> None:
    define(opcode, result, operands, function, narrow=True)


for to in _INTEGERS:
    for source in _INTEGERS:
        _define(f"cvt.{to}.{source}", to, (source,), _cast(DTYPES[to]))
    for rounding, function in _TO_INTEGER.items():
        for source in ("f32", "f64", "f16"):
            _define(f"cvt.{rounding}.{to}.{source}", to, (source,), _to_integer(DTYPES[to], function))
    for result in ("f32", "f64", "f16"):
        _define(f"cvt.rn.{result}.{to}", result, (to,), _cast(DTYPES[result]))
for rounding, function in _TO_INTEGER.items():
    _define(f"cvt.{rounding}.f32.f32", "f32", ("f32",), function)
_define("cvt.sat.f32.f32", "f32", ("f32",), lambda x: np.where(x > 0, np.minimum(x, F32.type(1)), F32.type(0)))
_define("cvta.to.global.u64", "u64", ("u64",), lambda x: x)  # a generic address that is not global shows at its use
_define("cvt.f32.f16", "f32", ("f16",), _cast(F32))
_define("cvt.f64.f32", "f64", ("f32",), _cast(DTYPES["f64"]))
_define("cvt.rn.f32.f64", "f32", ("f64",), _cast(F32))
_define("cvt.rn.f16.f32", "f16", ("f32",), _cast(DTYPES["f16"]))
_define("cvt.f32.bf16", "f32", ("bf16",), bf16_to_f32)
_define("cvt.rn.bf16.f32", "bf16", ("f32",), f32_to_bf16)
_define("cvt.rz.bf16.f32", "bf16", ("f32",), f32_to_bf16_toward_zero)
_define("cvt.rna.tf32.f32", "tf32", ("f32",), f32_to_tf32_away)
_define("cvt.rn.tf32.f32", "tf32", ("f32",), f32_to_tf32_even)
# the first operand becomes the upper half
_define("cvt.rn.bf16x2.f32", "bf16x2", ("f32", "f32"), lambda high, low: pack(f32_to_bf16(low), f32_to_bf16(high)))
_define(
    "cvt.rn.f16x2.f32",
    "f16x2",
    ("f32", "f32"),
    lambda high, low: pack(low.astype(DTYPES["f16"]), high.astype(DTYPES["f16"])),
)
