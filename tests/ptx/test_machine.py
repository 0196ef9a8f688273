"""Control flow: divergence, barriers, blocks, and what is refused."""

import numpy as np
import pytest

from tests.ptx import PtxError
from tests.ptx.snippets import run

SEEDS = (None, 0, 1, 2)
OWN = "mad.wide.u32 %rd10, %r0, 4, %rd0;\n"


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_diverge_and_meet_again(seed):
    body = """
        and.b32 %r10, %r0, 1;
        setp.eq.b32 %p1, %r10, 0;
        @%p1 bra $EVEN;
        mul.lo.s32 %r11, %r0, 100;
        bra.uni $MEET;
    $EVEN:
        neg.s32 %r11, %r0;
    $MEET:
        shfl.sync.bfly.b32 %r12, %r11, 1, 31, -1;
        st.global.b32 [%rd10], %r12;
    """
    out = np.zeros(64, np.int32)
    run(OWN + body, out, threads=64, seed=seed)
    lane = np.arange(64)
    own = np.where(lane % 2, lane * 100, -lane)
    assert (out == own[lane ^ 1]).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_loops_of_different_lengths(seed):
    body = """
        mov.b32 %r10, 0;
        mov.b32 %r11, 0;
    $LOOP:
        setp.ge.u32 %p1, %r11, %r0;
        @%p1 bra $DONE;
        add.s32 %r11, %r11, 1;
        add.s32 %r10, %r10, %r11;
        bra.uni $LOOP;
    $DONE:
        st.global.b32 [%rd10], %r10;
    """
    out = np.zeros(96, np.int32)
    run(OWN + body, out, threads=96, seed=seed)
    assert (out == np.arange(96) * (np.arange(96) + 1) // 2).all()


def test_early_return():
    out = np.zeros(32, np.int32)
    run(OWN + "setp.gt.u32 %p1, %r0, 9;\n@%p1 ret;\nst.global.b32 [%rd10], %r0;", out)
    assert (out == np.where(np.arange(32) < 10, np.arange(32), 0)).all()


def test_every_block_runs_once():
    out = np.zeros(3 * 5 * 2, np.int32)
    body = """
        mov.u32 %r10, %ctaid.x;
        mov.u32 %r11, %ctaid.y;
        mov.u32 %r12, %ctaid.z;
        mov.u32 %r13, %nctaid.x;
        mov.u32 %r14, %nctaid.y;
        mad.lo.s32 %r15, %r12, %r14, %r11;
        mad.lo.s32 %r15, %r15, %r13, %r10;
        mad.wide.s32 %rd10, %r15, 4, %rd0;
        ld.global.b32 %r16, [%rd10];
        add.s32 %r16, %r16, %r15;
        setp.eq.b32 %p1, %r0, 0;
        @%p1 st.global.b32 [%rd10], %r16;
    """
    run(body, out, grid=(3, 5, 2), seed=0)
    assert (out == np.arange(30)).all()


# every thread writes its number to shared memory and reads that of a thread in the next warp
EXCHANGE = """
    mov.b32 %r20, memory;
    mad.lo.s32 %r21, %r0, 4, %r20;
    st.shared.b32 [%r21], %r0;
    {barrier}
    add.s32 %r22, %r0, 32;
    and.b32 %r22, %r22, 127;
    mad.lo.s32 %r21, %r22, 4, %r20;
    ld.shared.b32 %r10, [%r21];
    st.global.b32 [%rd10], %r10;
"""


def _exchange(barrier: str, seed: int | None) -> bool:
    out = np.zeros(128, np.int32)
    run(OWN + EXCHANGE.format(barrier=barrier), out, threads=128, shared=512, seed=seed)
    return bool((out == (np.arange(128) + 32) % 128).all())


def test_a_missing_barrier_shows_under_every_seed():
    for seed in range(8):
        assert _exchange("bar.sync 0;", seed)
        with pytest.raises(PtxError, match=r"another warp (read|wrote), without a barrier"):
            _exchange("", seed)
    assert _exchange("", None)  # in step nothing is missed


def test_barriers_of_some_of_the_threads():
    """Warps 0 and 1 meet at barrier 1, 2 and 3 at barrier 2, which is enough to exchange within pairs."""
    body = EXCHANGE.replace("add.s32 %r22, %r0, 32;\n    and.b32 %r22, %r22, 127;", "xor.b32 %r22, %r0, 32;")
    split = "setp.lt.u32 %p1, %r0, 64;\n@%p1 bra $LOW;\n{high}\nbra.uni $ON;\n$LOW:\n{low}\n$ON:"
    out = np.zeros(128, np.int32)
    for seed in range(4):
        barrier = split.format(high="bar.sync 2, 64;", low="bar.sync 1, 64;")
        run(OWN + body.format(barrier=barrier), out, threads=128, shared=512, seed=seed)
        assert (out == np.arange(128) ^ 32).all()
    barrier = split.format(high="bar.sync 0;", low="bar.sync 1;")
    with pytest.raises(PtxError, match="deadlock"):
        run(OWN + body.format(barrier=barrier), out, threads=128, shared=512, seed=0)


def test_threads_that_returned_are_not_waited_for():
    out = np.zeros(128, np.int32)
    run(
        "setp.ge.u32 %p1, %r0, 64;\n@%p1 ret;\n" + OWN + "bar.sync 0;\nst.global.b32 [%rd10], %r0;",
        out,
        threads=128,
        seed=0,
    )
    assert (out == np.where(np.arange(128) < 64, np.arange(128), 0)).all()


def test_a_warp_must_be_whole_at_barriers_and_shuffles():
    skip = "setp.lt.u32 %p1, %r0, 7;\n@%p1 bra $SKIP;\n{}\n$SKIP:"
    with pytest.raises(PtxError, match=r"not all lanes of a warp are here: bar\.sync 0"):
        run(skip.format("bar.sync 0;"), seed=0)
    with pytest.raises(PtxError, match="not all lanes of a warp are here"):
        run(skip.format("shfl.sync.bfly.b32 %r10, %r0, 1, 31, -1;"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("add.s32.wrong %r10, %r0, 1;", "not known"),
        ("frobnicate.b32 %r10, %r0;", "not known"),
        ("add.sat.s32 %r10, %r0, 1;", "not known"),
        ("fma.rz.f32 %f10, %f10, %f10, %f10;", "not known"),
        ("add.s32 %r10, %r0, 1, 2;", "not with these operands"),
        ("add.s32 %r10, %r0;", "not with these operands"),
        ("add.s32 %r10, %rd10, 1;", "a register of 64 bits where s32 is read"),
        ("add.s32 %rd10, %r0, 1;", "cannot hold s32"),
        ("add.f32 %f10, %f10, 1;", "constant 1 where float32 is read"),
        ("add.s32 %r10, %r0, 0x1FFFFFFFF;", "constant 8589934591"),
        ("mov.b32 %r10, nowhere;", "nowhere cannot be read"),
        ("mov.u32 %r10, %clock;", "operand not known: %clock"),
        ("mov.b32 %r10, %r100;", "operand not known: %r100"),
        ("ld.global.volatile.b32 %r10, [%rd0];", "not known"),
        ("ld.global.v4.b32 {%r10, %r11}, [%rd0];", "expected 4 registers, got 2"),
        ("ld.global.b32 %r10, [%r0];", "a register of 32 bits where s64 is read"),
        ("ld.param.b32 %r10, [nothing];", "no such parameter"),
        ("bra $NOWHERE;", "no such label"),
        ("@%p1 bar.sync 0;", "a guarded barrier"),
        ("shfl.sync.bfly.b32 %r10, %r0, 1, 31, 1;", "a member mask other than all lanes"),
        ("mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 {%f10}, {%r1}, {%r1}, {%f1};", "not known"),
        (".shared .b8 more[4];", "directive not known"),
        ("atom.global.add.f32 %f10, [%rd10], %f10;", "not known"),
    ],
)
def test_what_is_not_known_raises_with_its_line(line, message):
    with pytest.raises(PtxError, match=r"PTX line 1\d.*") as error:
        run(f"ret;\n{line}")  # raises although it is never reached
    assert message in str(error.value)
