"""The number formats of PTX in numpy, and the roundings between them.

bf16 has no numpy dtype, so a bf16 value is a uint16 bit pattern. A register is an array over lanes of any dtype of its
width: what an instruction does not write in the dtype it wants is viewed as that dtype, never converted.
"""

import numpy as np

DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "pred": np.bool_,
        **{f"u{bits}": f"u{bits // 8}" for bits in (8, 16, 32, 64)},
        **{f"b{bits}": f"u{bits // 8}" for bits in (8, 16, 32, 64)},
        **{f"s{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)},
        **{f"f{bits}": f"f{bits // 8}" for bits in (16, 32, 64)},
        "bf16": np.uint16,
        "bf16x2": np.uint32,
        "f16x2": np.uint32,
        "f32x2": np.uint64,
        "tf32": np.uint32,
    }.items()
}
UNSIGNED = {0: np.dtype(np.bool_), 8: DTYPES["u8"], 16: DTYPES["u16"], 32: DTYPES["u32"], 64: DTYPES["u64"]}
SIGNED = {bits: DTYPES[f"s{bits}"] for bits in (8, 16, 32, 64)}
F16, F32, F64, U16, U32, U64 = (DTYPES[name] for name in ("f16", "f32", "f64", "u16", "u32", "u64"))
_TINY = np.finfo(np.float32).tiny


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(F32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even; every NaN becomes 0x7FFF, as on the chip."""
    bits = x.view(U32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(U16))


def f32_to_bf16_toward_zero(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), np.uint16(0x7FFF), (x.view(U32) >> np.uint32(16)).astype(U16))


def f32_to_tf32_away(x: np.ndarray) -> np.ndarray:
    """To the nearest value of 10 bits of mantissa, ties away from zero (cvt.rna)."""
    bits = (x.view(U32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), bits, x.view(U32))


def f32_to_tf32_even(x: np.ndarray) -> np.ndarray:
    bits = x.view(U32)
    rounded = (bits + (np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1)))) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, bits)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal fp32 to zero of the same sign (.ftz)."""
    return x * (np.abs(x) >= _TINY)


def pack(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two arrays of 16 bits in one of 32."""
    return low.view(U16).astype(U32) | (high.view(U16).astype(U32) << np.uint32(16))


def halves(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """[n, 2] of half the width; the lower half first."""
    return np.ascontiguousarray(x).view(dtype).reshape(-1, 2)


def whole(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The inverse of halves."""
    return np.ascontiguousarray(x).view(dtype).reshape(-1)
