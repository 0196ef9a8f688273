"""Shuffles, reductions, votes, and moving matrices, against loops over lanes."""

import numpy as np
import pytest

from tests.ptx import PtxError
from tests.ptx.snippets import compute, run

RANDOM = np.random.default_rng(0)
X = RANDOM.integers(-(2**31), 2**31, 32, np.int32)


def _shuffled(mode: str, b: int, width: int) -> np.ndarray:
    """As the CUDA manual describes __shfl_*_sync: within segments of `width` lanes, the own value from outside."""
    result = X.copy()
    for lane in range(32):
        first = lane // width * width
        source = {"bfly": lane ^ b, "up": lane - b, "down": lane + b, "idx": first + b % width}[mode]
        if first <= source < first + width or (mode == "bfly" and source < first + width):
            result[lane] = X[source]
    return result


@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("mode", ["bfly", "idx", "up", "down"])
def test_shuffles(mode, width):
    for b in (0, 1, 5, 7):
        clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
        got = compute(f"shfl.sync.{mode}.b32 $d, $0, {b}, {clamp}, -1", np.int32, X)
        assert (got == _shuffled(mode, b, width)).all(), b


def test_reductions_and_votes():
    bits = X.view(np.uint32)
    full = np.full(32, -1, np.int32)
    assert (compute("redux.sync.min.s32 $d, $0, $1", np.int32, X, full) == X.min()).all()
    assert (compute("redux.sync.max.u32 $d, $0, $1", np.uint32, bits, full) == bits.max()).all()
    assert (compute("redux.sync.add.s32 $d, $0, $1", np.int32, X, full) == X.sum(dtype=np.int32)).all()
    assert (compute("redux.sync.xor.b32 $d, $0, $1", np.uint32, bits, full) == np.bitwise_xor.reduce(bits)).all()
    p = X > 0
    assert (compute("vote.sync.any.pred $d, $0, -1", np.bool_, p) == p.any()).all()
    assert (compute("vote.sync.all.pred $d, $0, -1", np.bool_, p) == p.all()).all()
    ballot = sum(int(bit) << lane for lane, bit in enumerate(p))
    assert (compute("vote.sync.ballot.b32 $d, $0, -1", np.uint32, p) == ballot).all()


def _moved(count: int, transposed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Four 8 × 8 matrices; the registers [count, 32] that ldmatrix gives of them; what stmatrix makes of those."""
    matrices = RANDOM.integers(0, 2**16, (4, 8, 8), np.uint16)
    loaded, stored = np.zeros((4, 32), np.uint32), np.zeros((4, 8, 8), np.uint16)
    names = ", ".join(f"%r{10 + i}" for i in range(count))
    trans = ".trans" if transposed else ""
    body = f"""
        mov.b32 %r20, memory;
        mad.lo.s32 %r21, %r0, 16, %r20;
        mad.wide.u32 %rd10, %r0, 16, %rd0;
        ld.global.v4.b32 {{%r30, %r31, %r32, %r33}}, [%rd10];
        st.shared.v4.b32 [%r21], {{%r30, %r31, %r32, %r33}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r21];
        mad.wide.u32 %rd11, %r0, 4, %rd1;
        {" ".join(f"st.global.b32 [%rd11+{128 * i}], %r{10 + i};" for i in range(count))}
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r21+512], {{{names}}};
        bar.sync 0;
        ld.shared.v4.b32 {{%r30, %r31, %r32, %r33}}, [%r21+512];
        mad.wide.u32 %rd12, %r0, 16, %rd2;
        st.global.v4.b32 [%rd12], {{%r30, %r31, %r32, %r33}};
    """
    run(body, matrices, loaded, stored, shared=1024, seed=0)
    return matrices, loaded, stored


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices(count, transposed):
    """Lane l holds elements 2 (l % 4) and 2 (l % 4) + 1 of row l // 4, or of that column."""
    matrices, loaded, stored = _moved(count, transposed)
    for i in range(count):
        matrix = matrices[i].T if transposed else matrices[i]
        for lane in range(32):
            low, high = matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            assert loaded[i, lane] == int(low) | int(high) << 16
    assert (stored[:count] == matrices[:count]).all()
    assert (stored[count:] == 0xFFFF).all()  # never written


def test_rows_of_matrices_are_aligned():
    body = "mov.b32 %r20, memory;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r20+8];"
    with pytest.raises(PtxError, match="misaligned access of 16 bytes at byte 8 of shared memory"):
        run(body, shared=64)
