"""Loads, stores and copies: vectors, sizes, and every way to miss a buffer."""

import numpy as np
import pytest
import torch

from tests.ptx import Program, PtxError
from tests.ptx.code import Code
from tests.ptx.machine import Launch
from tests.ptx.memory import Global
from tests.ptx.parser import parse
from tests.ptx.snippets import run

RANDOM = np.random.default_rng(0)
COPY_OWN_WORD = """
    mad.wide.u32 %rd10, %r0, 4, %rd0;
    mad.wide.u32 %rd11, %r0, 4, %rd1;
    ld.global.b32 %r10, [%rd11];
    st.global.b32 [%rd10], %r10;
"""


def test_vectors():
    source = RANDOM.integers(0, 2**32, 128, np.uint32)
    out = np.zeros(128, np.uint32)
    body = """
        mad.wide.u32 %rd10, %r0, 16, %rd0;
        mad.wide.u32 %rd11, %r0, 16, %rd1;
        ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd11];
        st.global.v2.b32 [%rd10+8], {%r10, %r11};
        mov.b64 %rd12, {%r12, %r13};
        st.global.b64 [%rd10], %rd12;
    """
    run(body, out, source)
    assert (out.reshape(32, 4) == source.reshape(32, 4)[:, [2, 3, 0, 1]]).all()


def test_narrow_types_fill_their_registers_by_sign():
    source = RANDOM.integers(-128, 128, 32, np.int8)
    out = np.zeros(64, np.int32)
    body = """
        cvt.u64.u32 %rd10, %r0;
        add.s64 %rd10, %rd10, %rd1;
        ld.global.s8 %r10, [%rd10];
        ld.global.u8 %r11, [%rd10];
        mad.wide.u32 %rd11, %r0, 8, %rd0;
        st.global.v2.b32 [%rd11], {%r10, %r11};
    """
    run(body, out, source)
    assert (out[::2] == source).all()
    assert (out[1::2] == source.view(np.uint8)).all()


def test_parameters_are_passed_by_their_type():
    out = np.zeros(32, np.int64)
    run("mad.wide.u32 %rd10, %r0, 8, %rd0;\nst.global.b64 [%rd10], %rd1;", out, -5)
    assert (out == -5).all()  # ld.param.s32 into 64 bits
    out = np.zeros(32, np.float32)
    run("mad.wide.u32 %rd10, %r0, 4, %rd0;\nst.global.f32 [%rd10], %f1;", out, 0.1)
    assert (out == np.float32(0.1)).all()
    with pytest.raises(PtxError, match="argument 1: 4294967296 is not a u32"):
        run("", out, 1 << 32)


def test_tensors_are_read_and_written_in_place():
    source = torch.randn(64).to(torch.bfloat16)
    view = torch.zeros(2, 64, dtype=torch.bfloat16)
    run(COPY_OWN_WORD, view[1], source)
    assert torch.equal(view[1], source)
    assert (view[0] == 0).all()


def test_an_access_past_the_end_names_line_buffer_and_offset():
    body = "    .loc 1 77 3\n" + COPY_OWN_WORD
    with pytest.raises(
        PtxError, match=r"PTX line \d+, source line 77: 4 bytes at byte 120 of argument 1.*120 bytes.*2 lanes"
    ):
        run(body, np.zeros(32, np.uint32), np.zeros(30, np.uint32))
    with pytest.raises(PtxError, match=r"of argument 0.*st\.global\.b32"):
        run(body, np.zeros(31, np.uint32), np.zeros(32, np.uint32))


def test_names_of_arguments():
    kernel = ".version 8.0\n.visible .entry k(.param .u64 p)\n{ .reg .b64 %d<2>; ld.param.b64 %d0, [p];\n"
    program = Program.parse(kernel + "ld.global.b64 %d1, [%d0+-8]; ret;\n}\n")
    with pytest.raises(PtxError, match="8 bytes at byte -8 of lse"):
        program.run((1,), {"lse": np.zeros(9)}, threads=32)


def test_only_the_extent_of_a_view_is_its_own():
    whole = torch.zeros(4, 32)
    run(COPY_OWN_WORD, whole[1], whole[2])
    with pytest.raises(PtxError, match="byte 128 of argument 0"):
        run(COPY_OWN_WORD.replace("st.global.b32 [%rd10]", "st.global.b32 [%rd10+4]"), whole[1], whole[2])


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_misaligned_accesses(size):
    body = {
        2: "ld.global.b16 %rs10, [%rd0+1];",
        4: "ld.global.b32 %r10, [%rd0+2];",
        8: "ld.global.v2.b32 {%r10, %r11}, [%rd0+4];",
        16: "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd0+8];",
    }[size]
    with pytest.raises(PtxError, match=rf"misaligned access of {size} bytes at byte {size // 2} of argument 0"):
        run(body, np.zeros(32, np.uint32))


def test_alignment_is_that_of_the_memory_itself():
    """A view that begins between two multiples of 16 bytes takes no loads of 16 bytes at its start, but behind it."""
    x = torch.arange(32.0)[1:]
    with pytest.raises(PtxError, match="misaligned"):
        run("ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd0];", x)
    out = torch.zeros(32)
    run("ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd1+12];\nst.global.b32 [%rd0], %r10;", out, x)
    assert out[0] == 4


def test_wild_pointers():
    with pytest.raises(PtxError, match="belongs to no buffer"):
        run("mov.b64 %rd10, 64;\nld.global.b32 %r10, [%rd10];", np.zeros(32))
    with pytest.raises(PtxError, match="of argument 0"):
        run("shl.b64 %rd10, %rd1, 33;\nadd.s64 %rd10, %rd10, %rd0;\nld.global.b32 %r10, [%rd10];", np.zeros(32), 1)


def test_lanes_that_are_off_access_nothing():
    x = np.arange(16, dtype=np.uint32)
    out = np.zeros(32, np.uint32)
    body = COPY_OWN_WORD.replace("ld.global", "setp.lt.u32 %p1, %r0, 16;\nmov.b32 %r10, 7;\n@%p1 ld.global")
    run(body, out, x)
    assert (out == np.where(np.arange(32) < 16, np.arange(32), 7)).all()


SHARED = "mov.b32 %r20, memory;\nmad.lo.s32 %r21, %r0, 4, %r20;\nmad.wide.u32 %rd10, %r0, 4, %rd0;\n"


def test_shared_memory_is_poison_until_written_and_of_the_launched_size():
    out = np.zeros(32, np.float32)
    run(SHARED + "ld.shared.b32 %r10, [%r21];\nst.global.b32 [%rd10], %r10;", out, shared=128)
    assert np.isnan(out).all()
    run(
        SHARED + "st.shared.b32 [%r21], %r0;\nld.shared.b32 %r10, [%r21];\nst.global.b32 [%rd10], %r10;",
        out,
        shared=128,
    )
    assert (out.view(np.uint32) == np.arange(32)).all()
    with pytest.raises(PtxError, match="4 bytes at byte 124 of shared memory, which has 124 bytes"):
        run(SHARED + "st.shared.b32 [%r21], %r0;", out, shared=124)
    with pytest.raises(PtxError, match="misaligned access of 8 bytes at byte 4 of shared memory"):
        run(SHARED + "ld.shared.b64 %rd11, [%r20+4];", out, shared=128)


def _copied(before_reading: str, length: str = "", groups: int = 1) -> np.ndarray:
    """What each thread reads of the 16 bytes that it copied, all 7s, in the first of `groups` groups."""
    out, source = np.zeros(32, np.float32), np.full(128, 7, np.float32)
    more = "cp.async.cg.shared.global [%r22+512], [%rd11], 16;\ncp.async.commit_group;\n" * (groups - 1)
    body = f"""
        mov.b32 %r20, memory;
        mad.lo.s32 %r22, %r0, 16, %r20;
        mad.wide.u32 %rd10, %r0, 4, %rd0;
        mad.wide.u32 %rd11, %r0, 16, %rd1;
        setp.lt.u32 %p1, %r0, 16;
        selp.b32 %r23, 16, 0, %p1;
        cp.async.cg.shared.global [%r22], [%rd11], 16{length};
        cp.async.commit_group;
        {more}
        {before_reading}
        ld.shared.b32 %r10, [%r22+12];
        st.global.b32 [%rd10], %r10;
    """
    run(body, out, source, shared=1024)
    return out


def test_a_copy_is_poison_until_waited_for():
    assert np.isnan(_copied("")).all()
    assert (_copied("cp.async.wait_group 0;") == 7).all()
    assert (_copied("cp.async.wait_all;") == 7).all()
    assert np.isnan(_copied("cp.async.wait_group 1;")).all()


def test_groups_land_in_order():
    assert (_copied("cp.async.wait_group 1;", groups=2) == 7).all()
    assert np.isnan(_copied("cp.async.wait_group 2;", groups=2)).all()


def test_a_copy_of_no_bytes_writes_zeros_and_reads_nothing():
    out = _copied("cp.async.wait_group 0;", ", %r23")
    assert (out == np.where(np.arange(32) < 16, 7, 0)).all()
    body = "mov.b32 %r20, memory;\ncp.async.cg.shared.global [%r20], [%rd0+999], 16, 0;"
    run(body, np.zeros(4), shared=16)
    with pytest.raises(PtxError, match="a source size other than 0 and the whole"):
        run(body.replace("16, 0", "16, 8"), np.zeros(4), shared=16)


def test_lanes_wait_for_their_own_copies():
    """A wait that half of the lanes take lands the copies of that half."""
    out = _copied("@%p1 cp.async.wait_group 0;")
    assert (out[:16] == 7).all()
    assert np.isnan(out[16:]).all()


STRUCTURE = """
.version 8.8
.target sm_80
.address_size 64
.visible .entry other(.param .align 8 .b8 other_p[8]) { ret; }
.visible .entry of_a_structure(.param .align 8 .b8 p[24])
.maxntid 32, 1, 1
.minnctapersm 2
{
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    mov.b64 %rd1, p;
    ld.param.u64 %rd2, [p];
    cvta.to.global.u64 %rd2, %rd2;
    mov.u32 %r1, %tid.x;
    and.b32 %r2, %r1, 3;
    mad.wide.u32 %rd3, %r2, 4, %rd1;
    ld.param.u32 %r3, [%rd3+PLACE];
    ld.param.v2.u32 {%r4, %r5}, [p+16];
    add.s32 %r3, %r3, %r5;
    mad.wide.u32 %rd2, %r1, 4, %rd2;
    st.global.u32 [%rd2], %r3;
    ret;
}
"""


def _of_a_structure(place: int) -> np.ndarray:
    """Words `place` / 4 on of the structure, thread i taking number i % 4 of them, plus the last one."""
    code, memory, out = (
        Code(parse(STRUCTURE.replace("PLACE", str(place)), "of_a_structure")),
        Global(),
        np.zeros(32, np.uint32),
    )
    words = np.array([memory.add("out", out.view(np.uint8)), 0, 0], np.uint64)
    words.view(np.uint32)[2:] = [10, 20, 30, 40]
    Launch(code, (1, 1, 1), 32, 0, [words.tobytes()], memory, 0).run()
    return out


def test_a_structure_as_a_parameter():
    assert _of_a_structure(8).tolist() == [50, 60, 70, 80] * 8


def test_a_structure_has_an_end_and_an_alignment():
    with pytest.raises(PtxError, match="4 bytes at byte 24 of parameter 0, which does not have them"):
        _of_a_structure(12)
    with pytest.raises(PtxError, match="misaligned access of 4 bytes at byte 10 of a parameter"):
        _of_a_structure(10)


def test_one_kernel_of_several():
    with pytest.raises(PtxError, match="exactly one kernel, got 2"):
        parse(STRUCTURE)
    with pytest.raises(PtxError, match="exactly one kernel missing, got 0"):
        parse(STRUCTURE, "missing")
