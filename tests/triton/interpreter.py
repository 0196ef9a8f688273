"""Triton's interpreter (TRITON_INTERPRET=1) made to compute as the GPU does.

As of Triton 3.6 to 3.9 it differs from the hardware in three ways, of which the first makes every bf16 kernel wrong:

- it keeps bf16 numbers as uint16 bit patterns, and `tl.dot` multiplies those patterns as integers;
- it rounds fp32 to bf16 toward zero, where the hardware rounds to the nearest, ties to even;
- it computes a tf32 dot in full fp32.

`mend()` replaces the two functions at fault in this process. It also spares a third of the time: unmended, every call
of a device function patches the whole language anew, which the launch around it has done already. Tests call `mend`;
the package never does.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert_unmended = interpreter._convert_float
_dot_unmended = interpreter.InterpreterBuilder.create_dot
_launch_unmended = interpreter.GridExecutor.__call__
_patch_unmended = interpreter._patch_lang
_patched: set[str] = set()  # modules of the language that are patched until the end of the launch


def mend() -> None:
    """Mend the interpreter in this process; a second call changes nothing."""
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter.GridExecutor.__call__ = _launch
    interpreter._patch_lang = _patch_once


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """a @ b + d on operands as the tensor cores see them, accumulated in the dtype of d."""
    if a.dtype.scalar.is_fp8() or b.dtype.scalar.is_fp8():
        return _dot_unmended(self, a, b, d, input_precision, max_num_imprecise_acc)
    accumulator = d.data.dtype
    x, y = (_operand(t, input_precision).astype(accumulator) for t in (a, b))
    return interpreter.TensorHandle(np.matmul(x, y) + d.data, d.dtype.scalar)


def _operand(t, input_precision):
    if t.dtype.scalar == tl.bfloat16:
        return bf16_to_fp32(t.data)
    if t.data.dtype == np.float32 and input_precision.name == "TF32":
        return round_to_tf32(t.data)
    return t.data


def _convert_float(x, input_dtype, output_dtype, rounding_mode):
    """fp32 to bf16 rounded to the nearest, unless another rounding is asked for; everything else as it was."""
    nearest = rounding_mode is None or rounding_mode.name == "RTNE"
    if input_dtype == tl.float32 and output_dtype == tl.bfloat16 and nearest:
        return round_to_bf16(x)
    return _convert_unmended(x, input_dtype, output_dtype, rounding_mode)


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of uint16 bf16 bit patterns: their upper halves."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """uint16 bf16 bit patterns of fp32 values, to the nearest, ties to even (cvt.rn.bf16.f32); NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(bits.view(np.float32)), np.uint16(0x7FFF), rounded)


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """fp32 values with 10 bits of mantissa, to the nearest, ties away from zero (cvt.rna.tf32.f32)."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def _launch(self, *args, **kwargs):
    _patched.clear()
    try:
        return _launch_unmended(self, *args, **kwargs)
    finally:
        _patched.clear()


def _patch_once(fn):
    modules = _language(fn)
    if modules <= _patched:
        return interpreter._LangPatchScope()
    _patched.update(modules)
    return _patch_unmended(fn)


@functools.cache
def _language(fn) -> frozenset[str]:
    """The modules of the language that a function sees, by name."""
    return frozenset(value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core)
