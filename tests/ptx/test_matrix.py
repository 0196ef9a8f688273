"""mma.sync and wgmma against numpy, with the layouts of fragments and tiles written out as the PTX manual has them."""

from unittest import mock

import numpy as np
import pytest
import torch

from tests.ptx import PtxError
from tests.ptx.snippets import run

RANDOM = np.random.default_rng(0)
LANE = np.arange(32)
GROUP, THREAD = LANE // 4, LANE % 4


def _bits(x: np.ndarray, t: str) -> tuple[np.ndarray, np.ndarray]:
    """Elements in the format as bits, and their exact values."""
    tensor = torch.from_numpy(x.astype(np.float32))
    if t == "tf32":
        bits = tensor.view(torch.int32).numpy().view(np.uint32) & np.uint32(0xFFFFE000)
        return bits, bits.view(np.float32).astype(np.float64)
    rounded = tensor.to(torch.bfloat16 if t == "bf16" else torch.float16)
    return rounded.view(torch.uint16).numpy(), rounded.double().numpy()


def _pair(bits: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """A register of each lane with two elements of a row."""
    return bits[row, column].astype(np.uint32) | bits[row, column + 1].astype(np.uint32) << np.uint32(16)


def _registers(a: np.ndarray, b: np.ndarray, t: str) -> list[np.ndarray]:
    """Fragments of A [16, K] and B [K, 8]."""
    if t == "tf32":
        left = [a[GROUP + row, THREAD + column] for column in (0, 4) for row in (0, 8)]
        return left + [b[THREAD + row, GROUP] for row in (0, 4)]
    left = [_pair(a, GROUP + row, 2 * THREAD + column) for column in (0, 8) for row in (0, 8)]
    return left + [_pair(b.T, GROUP, 2 * THREAD + row) for row in (0, 8)]


@pytest.mark.parametrize("t", ["bf16", "f16", "tf32"])
def test_mma(t):
    depth = 8 if t == "tf32" else 16
    (a, left), (b, right) = (_bits(RANDOM.standard_normal(shape), t) for shape in ((16, depth), (depth, 8)))
    c = RANDOM.standard_normal((16, 8)).astype(np.float32)
    places = [(GROUP + row, 2 * THREAD + column) for row in (0, 8) for column in (0, 1)]
    inputs = np.stack([*_registers(a, b, t), *(c[place].view(np.uint32) for place in places)])
    out = np.zeros((4, 32), np.float32)
    loads = "\n".join(f"ld.global.b32 %r{10 + i}, [%rd10+{128 * i}];" for i in range(10))
    body = f"""
        mad.wide.u32 %rd10, %r0, 4, %rd1;
        mad.wide.u32 %rd11, %r0, 4, %rd0;
        {loads}
        mma.sync.aligned.m16n8k{depth}.row.col.f32.{t}.{t}.f32
            {{%r20, %r21, %r22, %r23}}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r16, %r17, %r18, %r19}};
        {" ".join(f"st.global.b32 [%rd11+{128 * i}], %r{20 + i};" for i in range(4))}
    """
    run(body, out, inputs)
    expected = left @ right + c
    for got, place in zip(out, places, strict=True):
        np.testing.assert_allclose(got, expected[place], rtol=0, atol=1e-5)


def _swizzled(tile: np.ndarray, width: int) -> np.ndarray:
    """Rows of `width` bytes with their pieces of 16 bytes exchanged, as TMA and wgmma lay them out; as bytes."""
    rows = np.ascontiguousarray(tile).view(np.uint8).reshape(-1, width)
    memory = np.zeros(rows.size, np.uint8)
    for at in range(0, rows.size, 16):
        piece = rows.reshape(-1)[at : at + 16]
        to = at ^ (at >> 7 & width // 16 - 1) << 4
        memory[to : to + 16] = piece
    return memory


MODES = {128: 1, 64: 2, 32: 3}
WGMMA = """
    mov.b32 %r20, memory;
    mad.lo.s32 %r21, %r0, 16, %r20;
    mad.wide.u32 %rd10, %r0, 16, %rd1;
    {loads}
    bar.sync 0;
    fence.proxy.async.shared::cta;
    cvt.u64.u32 %rd20, %r20;
    shr.u64 %rd20, %rd20, 4;
    or.b64 %rd21, %rd20, {left};
    add.s64 %rd22, %rd20, {right};
    mov.b32 %f10, 0f40000000;
    mov.b32 %f11, %f10;
    mov.b32 %f12, %f10;
    mov.b32 %f13, %f10;
    setp.eq.b32 %p1, {keep}, 1;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f10, %f11, %f12, %f13}}, %rd21, %rd22, %p1, 1, 1, 0, {flip};
    {twice}
    wgmma.commit_group.sync.aligned;
    {wait}
    mad.wide.u32 %rd11, %r0, 16, %rd0;
    st.global.v4.b32 [%rd11], {{%f10, %f11, %f12, %f13}};
"""
WAIT = "wgmma.wait_group.sync.aligned 0;"


def _wgmma(width: int = 128, keep: int = 0, flip: int = 0, twice: bool = False, wait: str = WAIT):
    """Of A [64, 16] and B [16, 8]: what the lanes hold, as [64, 8], and the exact product.

    The tiles are 16 columns at an offset within rows of `width` bytes, as in a loop over the columns of larger tiles.
    """
    columns, skipped = width // 2, width // 32 - 1
    (a, left), (b, right) = (_bits(RANDOM.standard_normal((rows, columns)), "bf16") for rows in (64, 8))
    if flip:  # B's rows of 16 bytes hold one k each: [16, 8 of 16 columns] of width 32
        b, right = _bits(RANDOM.standard_normal((16, 16)), "bf16")
    memory = np.zeros(16384, np.uint8)
    memory[: 64 * width] = _swizzled(a, width)
    start = 8192
    b_width = 32 if flip else width
    memory[start : start + b.nbytes] = _swizzled(b, b_width)
    stride = 8 * width >> 4
    descriptor = MODES[width] << 62 | stride << 32 | 2 * skipped
    other = MODES[b_width] << 62 | (8 * b_width >> 4) << 32 | start >> 4 | (0 if flip else 2 * skipped)
    word = "{%r30, %r31, %r32, %r33}"
    loads = "\n".join(
        f"ld.global.v4.b32 {word}, [%rd10+{at}];\nst.shared.v4.b32 [%r21+{at}], {word};" for at in range(0, 16384, 2048)
    )
    signed = [x - (1 << 64) if x >> 63 else x for x in (descriptor, other)]
    body = WGMMA.format(loads=loads, left=signed[0], right=signed[1], keep=keep, flip=flip, wait=wait, twice="")
    if twice:
        line = next(line for line in body.splitlines() if "mma_async" in line)
        body = body.replace(line, line + "\n" + line.replace("%p1", "1"))
    out = np.zeros((128, 4), np.float32)
    run(body, out, memory, threads=128, shared=16384, seed=0)
    lanes = out.reshape(4, 8, 4, 2, 2)  # warp, row, pair of columns, half, column
    got = lanes.transpose(0, 3, 1, 2, 4).reshape(64, 8)
    cut = slice(16 * skipped, 16 * skipped + 16)
    return got, left[:, cut] @ (right[:, :8] if flip else right[:, cut].T)


@pytest.mark.parametrize("width", MODES)
def test_wgmma_in_every_swizzle(width):
    got, exact = _wgmma(width)
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5)


def test_wgmma_of_a_transposed_tile():
    got, exact = _wgmma(flip=1)
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5)


def test_wgmma_adds_to_its_accumulators():
    got, exact = _wgmma(keep=1)
    np.testing.assert_allclose(got, exact + 2, rtol=0, atol=1e-5)
    got, exact = _wgmma(twice=True)
    np.testing.assert_allclose(got, 2 * exact, rtol=0, atol=1e-5)


def test_accumulators_are_poison_until_waited_for():
    got, _ = _wgmma(wait="")
    assert np.isnan(got).all()
    got, _ = _wgmma(wait="wgmma.wait_group.sync.aligned 1;")
    assert np.isnan(got).all()


def test_tiles_must_not_change_before_the_wait():
    with pytest.raises(PtxError, match="a tile in shared memory was overwritten before the product was waited for"):
        _wgmma(wait=f"st.shared.b32 [%r20+8288], 0;\n{WAIT}")  # of B, which every warp reads


def test_tiles_pass_a_fence_before_they_are_read():
    for loads_first in ("", "fence.proxy.async.shared::cta;\n"):  # of the warps that write, or of those that read
        before = WGMMA.replace("    bar.sync 0;\n    fence.proxy", f"{loads_first}    bar.sync 0;\n    fence.proxy")
        fenced = before.replace("    bar.sync 0;\n    fence.proxy.async.shared::cta;", "    bar.sync 0;")
        with mock.patch.dict(globals(), WGMMA=fenced):
            if loads_first:
                got, exact = _wgmma()
                np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5)
            else:
                with pytest.raises(PtxError, match="without a fence"):
                    _wgmma()


def test_what_a_descriptor_may_not_hold():
    body = "mov.b64 %rd21, 0;\nwgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
    body += "{%f10, %f11, %f12, %f13}, %rd21, %rd21, 0, 1, 1, 0, 0;"
    with pytest.raises(PtxError, match="a tile without swizzle"):
        run(body, threads=128, shared=1024)
