"""A kernel's PTX with one mistake planted in it: the interpreter stops, or the result is wrong, where the test says so.

What goes unnoticed here would go unnoticed in a kernel.
"""

import functools
import re
from collections.abc import Callable, Iterable

import pytest
import torch

from tests.support.process import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("a kernel defined under TRITON_INTERPRET=1 cannot be compiled", allow_module_level=True)

import flamingo_kernels as fk
from tests.ptx import PtxError
from tests.ptx.triton_device import executed_on
from tests.support import dense_attention
from tests.support.attention_cases import Case
from tests.support.budget import assert_within_budget

pytestmark = pytest.mark.slow
# full tiles; the other one has rows and channels behind the end of its tiles
ALIGNED = Case(torch.bfloat16, "sliding", T=64, M=12)
ODD = Case(torch.bfloat16, "sliding", T=37, D=40, M=5, L=15)
SEEDS = range(3)
Edit = Callable[[str], str]


@functools.cache
def _expected(case: Case) -> tuple[dense_attention.Inputs, torch.Tensor, torch.Tensor]:
    inputs = case.inputs("cpu")
    return inputs, dense_attention.run(inputs, torch.float64).o, dense_attention.run(inputs).o


def _right(case: Case, cc: int, seed: int, edit: Edit | None = None) -> bool:
    """Whether forward gives the right output with the edited PTX."""
    inputs, exact, eager = _expected(case)
    with executed_on(cc, seed, edit):
        o = fk.masked_cross_attention(*inputs[:3], (inputs.start, inputs.end), softmax_scale=inputs.scale)
    try:
        assert_within_budget("o", o, exact, [eager])
    except AssertionError:
        return False
    return True


def _noticed(case: Case, cc: int, edit: Edit, seeds: Iterable[int] = SEEDS) -> bool:
    """Whether some seed brings a wrong output, or an error."""
    for seed in seeds:
        try:
            if not _right(case, cc, seed, edit):
                return True
        except PtxError:
            return True
    return False


def _without(pattern: str, which: int) -> Edit:
    """The PTX without one of the places where the pattern matches."""

    def edit(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx))[which]
        return ptx[: found.start()] + ptx[found.end() :]

    return edit


def _replaced(pattern: str, by: str | Callable[[re.Match], str]) -> Edit:
    def edit(ptx: str) -> str:
        edited, count = re.subn(pattern, by, ptx)
        assert count > 0
        return edited

    return edit


@pytest.mark.parametrize("cc", [80, 90])
@pytest.mark.parametrize("case", [ALIGNED, ODD], ids=str)
def test_nothing_planted(case, cc):
    assert all(_right(case, cc, seed) for seed in SEEDS)


def test_missing_barriers():
    """All 23 that this case meets, but for two that order no two accesses: at the end of the loop and behind it.

    The others stand where a key may be hidden from a whole tile, which none is here.
    """
    barrier = r"bar\.sync\s+0;"
    with executed_on(80) as ran:
        inputs = ALIGNED.inputs("cpu")
        fk.masked_cross_attention(*inputs[:3], (inputs.start, inputs.end))
    count = len(re.findall(barrier, ran["masked_cross_attention_fwd_kernel"]))
    assert sum(_noticed(ALIGNED, 80, _without(barrier, i), seeds=(0,)) for i in range(count)) >= 21
    assert _noticed(ALIGNED, 80, _replaced(barrier, ""))


@pytest.mark.parametrize("cc", [80, 90])
def test_copies_that_are_not_waited_for(cc):
    assert _noticed(ALIGNED, cc, _without(r"cp\.async\.wait_group\s+\d+;", 0))
    assert _noticed(ALIGNED, cc, _replaced(r"cp\.async\.wait_group\s+\d+;", "cp.async.wait_group 3;"))
    assert _noticed(ALIGNED, cc, _without(r"cp\.async\.commit_group;", 1))


def test_a_missing_fence():
    """Between what is written to shared memory and the products that read it."""
    assert _noticed(ALIGNED, 90, _replaced(r"fence\.proxy\.async\.shared::cta;", ""), seeds=(0,))


def test_products_that_are_not_waited_for():
    for i in range(2):
        assert _noticed(ALIGNED, 90, _without(r"wgmma\.wait_group\.sync\.aligned\s+0;", i))


@pytest.mark.parametrize("access", ["ld.global", "st.global"])
def test_a_mask_that_is_missing(access):
    """Loads and stores behind the end of a tensor are outside of its buffer."""
    with pytest.raises(PtxError, match=rf"bytes at byte -?\d+ of \w+, which has \d+ bytes.*: {access}"):
        _right(ODD, 80, 0, _replaced(rf"@%p\d+ {re.escape(access)}", access))


def test_hidden_keys_that_are_not_masked():
    assert _noticed(ALIGNED, 80, _replaced(r"selp\.f32(\s+%r\d+), (%r\d+), 0fFF800000, %p\d+", r"mov.b32\1, \2"))


def test_a_stride_of_the_wrong_dimension():
    """q's and o's rows: parameter 13 is q_t, and 12 is q_b."""
    name = "masked_cross_attention_fwd_kernel_param_"
    with pytest.raises(PtxError, match="of q, which has"):
        _right(ALIGNED, 80, 0, _replaced(rf"{name}13\]", f"{name}12]"))


def test_an_offset_of_the_wrong_size():
    """Elements taken for four bytes each."""
    assert _noticed(ALIGNED, 80, _replaced(r"shl\.b64(\s+%rd\d+, %rd\d+), 1;", r"shl.b64\1, 2;"))


def test_swizzles_that_do_not_match():
    """wgmma reads rows of 64 bytes where rows of 128 were written: the upper bits of descriptors become 2, from 1."""
    assert _noticed(ALIGNED, 90, _replaced(r"\b4611686\d{12}\b", lambda number: str(int(number[0]) + (1 << 62))))
