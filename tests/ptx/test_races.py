"""Which pairs of accesses to shared memory by different warps are races."""

import numpy as np
import pytest

from tests.ptx import PtxError
from tests.ptx.snippets import run

# warp 0 does one thing with the first words of shared memory, warp 1 another
APART = """
    mov.b32 %r20, memory;
    and.b32 %r22, %r0, 31;
    mad.lo.s32 %r21, %r22, 4, %r20;
    st.shared.b32 [%r21], 7;
    bar.sync 0;
    setp.lt.u32 %p1, %r0, 32;
    @%p1 bra $FIRST;
    {second}
    bra.uni $ON;
    $FIRST:
    {first}
    $ON:
    {behind}
"""
READ, WRITE, SAME = "ld.shared.b32 %r10, [%r21];", "st.shared.b32 [%r21], %r0;", "st.shared.b32 [%r21], 7;"


def _run(seed: int, first: str, second: str, behind: str = "") -> None:
    body = APART.format(first=first, second=second, behind=behind)
    run(body, np.zeros(1, np.int32), threads=64, shared=256, seed=seed)


SEEDS = pytest.mark.parametrize("seed", range(4))


@pytest.mark.parametrize(("first", "second"), [(READ, WRITE), (WRITE, READ), (WRITE, WRITE), (READ, SAME)])
@SEEDS
def test_races(first, second, seed):
    with pytest.raises(PtxError, match=r"another warp (read|wrote), without a barrier"):
        _run(seed, first, second)


@pytest.mark.parametrize(
    ("first", "second", "behind"),
    [
        (READ, READ, ""),
        (SAME, SAME, ""),
        (WRITE + READ, "", ""),
        (WRITE, "", f"bar.sync 0;\n{READ}"),
        (READ, "", f"bar.sync 0;\n{SAME}"),
        (WRITE, WRITE.replace("[%r21]", "[%r21+128]"), ""),
    ],
)
@SEEDS
def test_what_is_none(first, second, behind, seed):
    _run(seed, first, second, behind)


@SEEDS
def test_a_copy_that_another_warp_does_not_expect(seed):
    copy = "cp.async.ca.shared.global [%r21], [%rd0], 4;\ncp.async.wait_all;"
    with pytest.raises(PtxError, match=r"another warp (read|wrote), without a barrier"):
        _run(seed, READ, copy)
