"""Every kernel's PTX, from nvcc for sm_80 and sm_90, gives what the emulator gives, at aligned and odd shapes."""

from unittest import mock

import pytest

import flamingo_kernels as fk
from tests.support.process import EMULATED

if not EMULATED:
    pytest.skip("runs beside the emulator (pytest -p tests.cusim.plugin)", allow_module_level=True)

from flamingo_kernels import _backends as choice
from flamingo_kernels import _cuda
from tests.cuda import ptx
from tests.cuda.resources import nvcc, parts
from tests.cuda.test_schedules import RUNS
from tests.cusim.margins import Margins

CHIPS = (80, 90)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")]


def _run(op: str, case: str, cc: int) -> list[str]:
    """The kernels that ran."""
    with fk.use_backend("cuda"), ptx.beside_the_emulator(_cuda, cc, seed=0) as ran:
        RUNS[op, case](Margins())
    return ran


@pytest.mark.parametrize("cc", CHIPS)
def test_the_ptx_agrees_with_the_emulator(cc: int) -> None:
    """And no kernel is left out."""
    ran = set()
    for op, case in RUNS:
        if choice._has("cuda", op):
            ran |= {parts(kernel)[0] for kernel in _run(op, case, cc)}
    assert ran == {parts(kernel)[0] for kernel in ptx.kernels(cc)}


@pytest.mark.parametrize(
    ("op", "right", "wrong"),
    [
        ("norm_linear", "rsqrt.approx.f32", "sqrt.approx.f32"),
        ("masked_cross_attention", "ex2.approx.ftz.f32", "lg2.approx.ftz.f32"),
    ],
)
def test_another_instruction_is_noticed(op: str, right: str, wrong: str) -> None:
    case = next(case for of, case in RUNS if of == op)
    compiled = ptx.compiled

    def mistaken(source: str, cc: int) -> str:
        text = compiled(source, cc)
        return text.replace(right, wrong)

    ptx.forget()
    try:
        with mock.patch.object(ptx, "compiled", mistaken), pytest.raises(AssertionError, match=r"apart|finite"):
            _run(op, case, 80)
    finally:
        ptx.forget()
