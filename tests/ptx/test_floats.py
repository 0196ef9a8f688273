"""Floating point: rounding, NaN, subnormal numbers, pairs, and the approximations, against numpy and torch."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ptx.snippets import compute

RANDOM = np.random.default_rng(0)
SPECIAL = [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38, 65520.0, 1.00390625, 1.01171875]
F32 = np.concatenate([SPECIAL, RANDOM.standard_normal(20)]).astype(np.float32)


def _bf16(x: np.ndarray) -> np.ndarray:
    """The bits of a bf16 tensor."""
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.uint16).numpy()


def _same(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the bit, but for the kind of NaN."""
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(expected[~np.isnan(expected)]))


def test_arithmetic():
    a, b = F32, F32[::-1].copy()
    with np.errstate(all="ignore"):
        for name, expected in {"add": a + b, "sub": a - b, "mul": a * b}.items():
            _same(compute(f"{name}.f32 $d, $0, $1", np.float32, a, b), expected)
        _same(compute("div.full.f32 $d, $0, $1", np.float32, a, b), a / b)
    _same(compute("neg.f32 $d, $0", np.float32, a), -a)
    _same(compute("abs.f32 $d, $0", np.float32, a), np.abs(a))


def test_fused_products_are_rounded_once():
    a = np.float32(1) + np.arange(32, dtype=np.float32) * np.float32(2**-23)
    c = -(a * a)
    exact = a.astype(np.float64) * a + c
    assert (exact != 0).any()  # what rounding the product first would leave is nothing
    _same(compute("fma.rn.f32 $d, $0, $0, $1", np.float32, a, c), exact.astype(np.float32))


def test_subnormal_numbers_are_flushed_on_request_alone():
    tiny, one = np.full(32, -1e-40, np.float32), np.ones(32, np.float32)
    _same(compute("mul.f32 $d, $0, $1", np.float32, tiny, one), tiny)
    _same(compute("mul.ftz.f32 $d, $0, $1", np.float32, tiny, one), np.full(32, -0.0, np.float32))
    _same(compute("ex2.approx.ftz.f32 $d, $0", np.float32, np.full(32, -127, np.float32)), np.zeros(32, np.float32))
    _same(
        compute("ex2.approx.f32 $d, $0", np.float32, np.full(32, -127, np.float32)), np.full(32, 2.0**-127, np.float32)
    )


def test_nan_in_minimum_and_maximum():
    a, b = F32, np.where(np.arange(32) % 2, np.float32(0.5), F32[::-1])
    _same(compute("max.f32 $d, $0, $1", np.float32, a, b), np.fmax(a, b))
    _same(compute("min.NaN.f32 $d, $0, $1", np.float32, a, b), np.minimum(a, b))
    _same(compute("max.f32 $d, $0, $1, $1", np.float32, a, b), np.fmax(a, b))


def test_comparisons_with_nan():
    a, b = F32, np.where(np.arange(32) % 2, F32, np.float32(np.nan))
    nan = np.isnan(a) | np.isnan(b)
    expected = {"eq": ~nan & (a == b), "ne": ~nan & (a != b), "neu": nan | (a != b), "ltu": nan | (a < b), "num": ~nan}
    for name, value in expected.items():
        assert (compute(f"setp.{name}.f32 $d, $0, $1", np.bool_, a, b) == value).all(), name


@pytest.mark.parametrize(
    ("name", "function"),
    {
        "ex2": np.exp2,
        "lg2": np.log2,
        "rcp": np.reciprocal,
        "sqrt": np.sqrt,
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "tanh": np.tanh,
    }.items(),
)
def test_approximations(name, function):
    a = RANDOM.uniform(0.1, 3, 32).astype(np.float32)
    got = compute(f"{name}.approx.f32 $d, $0", np.float32, a)
    error = np.abs(got / function(a.astype(np.float64)) - 1).max()
    assert error < 2.0**-21 or (name == "tanh" and 2.0**-14 < error < 2.0**-10)


def test_rounding_to_half_formats():
    with np.errstate(all="ignore"):
        half = F32.astype(np.float16)
    _same(compute("cvt.rn.f16.f32 $d, $0", np.float16, F32), half)
    _same(compute("cvt.f32.f16 $d, $0", np.float32, half), half.astype(np.float32))
    numbers = ~np.isnan(F32)
    assert (compute("cvt.rn.bf16.f32 $d, $0", np.uint16, F32) == _bf16(F32))[numbers].all()
    assert (compute("cvt.rn.bf16.f32 $d, $0", np.uint16, F32)[~numbers] == 0x7FFF).all()
    wide = compute("cvt.f32.bf16 $d, $0", np.float32, _bf16(F32))
    _same(wide, torch.from_numpy(F32).bfloat16().float().numpy())
    pairs = compute("cvt.rn.bf16x2.f32 $d, $0, $1", np.uint32, F32, F32[::-1].copy()).view(np.uint16).reshape(32, 2)
    assert (pairs[:, 1] == _bf16(F32))[numbers].all()  # the first operand is the upper half
    assert (pairs[:, 0] == _bf16(F32[::-1].copy()))[numbers[::-1]].all()


def test_rounding_to_tf32():
    """10 bits of mantissa. 1 + 2**-11 lies in the middle: away from zero is up, to even is down."""
    a = np.full(32, 1 + 2**-11, np.float32)
    assert (compute("cvt.rna.tf32.f32 $d, $0", np.float32, a) == np.float32(1 + 2**-10)).all()
    assert (compute("cvt.rn.tf32.f32 $d, $0", np.float32, a) == 1).all()


def test_conversions_to_and_from_integers():
    a = np.array([2.5, -2.5, 1e20, -1e20, np.nan, 0.99, -0.99, 3.5] * 4, np.float32)
    limits = np.iinfo(np.int32)
    toward_zero = [2, -2, limits.max, limits.min, 0, 0, 0, 3] * 4
    to_even = [2, -2, limits.max, limits.min, 0, 1, -1, 4] * 4
    assert compute("cvt.rzi.s32.f32 $d, $0", np.int32, a).tolist() == toward_zero
    assert compute("cvt.rni.s32.f32 $d, $0", np.int32, a).tolist() == to_even
    assert (compute("cvt.rzi.u32.f32 $d, $0", np.uint32, a)[3::8] == 0).all()
    integers = RANDOM.integers(-(2**31), 2**31, 32, np.int32)
    _same(compute("cvt.rn.f32.s32 $d, $0", np.float32, integers), integers.astype(np.float32))


def test_pairs_of_fp32():
    a, b = (RANDOM.standard_normal((32, 2)).astype(np.float32) for _ in range(2))
    packed = [x.view(np.uint64).reshape(32) for x in (a, b)]
    got = compute("add.rn.f32x2 $d, $0, $1", np.uint64, *packed).view(np.float32).reshape(32, 2)
    _same(got, a + b)
    got = compute("fma.rn.f32x2 $d, $0, $1, $0", np.uint64, *packed).view(np.float32).reshape(32, 2)
    _same(got, (a.astype(np.float64) * b + a).astype(np.float32))


@pytest.mark.parametrize("t", ["f16", "bf16"])
def test_half_arithmetic(t):
    """Against torch, which computes these in fp32 and rounds once."""
    dtype = torch.float16 if t == "f16" else torch.bfloat16
    a, b = (torch.from_numpy(RANDOM.standard_normal(64).astype(np.float32)).to(dtype) for _ in range(2))
    low, both = [x[:32].view(torch.uint16).numpy() for x in (a, b)], [x.view(torch.int32).numpy() for x in (a, b)]
    for name, expected in {"add": a + b, "mul": a * b, "max": torch.maximum(a, b)}.items():
        expected = expected.view(torch.uint16).numpy()
        assert (compute(f"{name}.{t} $d, $0, $1", np.uint16, *low) == expected[:32]).all(), name
        assert (compute(f"{name}.{t}x2 $d, $0, $1", np.uint32, *both).view(np.uint16) == expected).all(), name
    less = (a < b).numpy()
    assert (compute(f"setp.lt.{t} $d, $0, $1", np.bool_, *low) == less[:32]).all()
    assert (compute(f"setp.lt.{t}x2 $d|%p11, $0, $1", np.bool_, *both) == less[::2]).all()
    assert (compute(f"setp.lt.{t}x2 %p11|$d, $0, $1", np.bool_, *both) == less[1::2]).all()
    c = RANDOM.standard_normal(32).astype(np.float32)
    _same(compute(f"sub.rn.f32.{t} $d, $0, $1", np.float32, low[0], c), a[:32].float().numpy() - c)


def test_fused_products_rounded_down():
    a, b, c = F32, F32[::-1].copy(), np.roll(F32, 7)
    got = compute("fma.rm.f32 $d, $0, $1, $2", np.float32, a, b, c)
    for x, y, z, result in zip(a, b, c, got, strict=True):
        if not np.isfinite([x, y, z]).all() or not np.isfinite(result):
            continue
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert Fraction(float(result)) <= exact < Fraction(float(np.nextafter(result, np.float32(np.inf))))


def test_saturation_and_signs():
    _same(compute("cvt.sat.f32.f32 $d, $0", np.float32, F32), np.nan_to_num(np.clip(F32, 0, 1), nan=0.0) + 0.0)
    _same(compute("copysign.f32 $d, $0, $1", np.float32, F32, F32[::-1].copy()), np.copysign(F32[::-1], F32))
