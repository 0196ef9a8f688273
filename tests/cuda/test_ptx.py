"""Every kernel's PTX, from nvcc for sm_80 and sm_90, gives what the emulator gives, at an aligned and an odd shape."""

import pytest

import flamingo_kernels as fk
from tests.support.process import EMULATED

if not EMULATED:
    pytest.skip("runs beside the emulator (pytest -p tests.cusim.plugin)", allow_module_level=True)

from flamingo_kernels import _backends as choice
from flamingo_kernels import _cuda
from tests.cuda.ptx import beside_the_emulator
from tests.cuda.resources import nvcc
from tests.cuda.test_schedules import RUNS
from tests.cusim.margins import Margins

pytestmark = [pytest.mark.slow, pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")]


@pytest.mark.parametrize("cc", [80, 90])
@pytest.mark.parametrize(("op", "case"), RUNS, ids=str)
def test_the_ptx_agrees_with_the_emulator(op: str, case: str, cc: int) -> None:
    if not choice._has("cuda", op):
        pytest.skip(f"the backend does not have {op}")
    with fk.use_backend("cuda"), beside_the_emulator(_cuda, cc, seed=0) as ran:
        RUNS[op, case](Margins())
    assert ran
