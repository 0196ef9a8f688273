"""Every CUDA kernel on every chip from sm_80 to sm_120: nothing in the committed table is too much, and it holds.

What is compiled anew to see whether it holds is each source for one of the six chips; `python -m tests.cuda.resources`
compiles all.
"""

import json

import pytest

from tests.support.process import EMULATED

pytest.importorskip("triton")  # whose wheel has the tools that read cubins
if not EMULATED:
    pytest.skip("asks the emulator for launches (pytest -p tests.cusim.plugin)", allow_module_level=True)

from flamingo_kernels import _cuda
from tests.cuda import resources
from tests.triton.chips import CHIPS

if resources.nvcc() is None:
    pytest.skip("nvcc is not installed", allow_module_level=True)

COMMITTED = json.loads(resources.TABLE.read_text())
EACH = [
    (name, instantiation, int(chip[3:]), kernel)
    for name, instantiations in COMMITTED["kernels"].items()
    for instantiation, chips in instantiations.items()
    for chip, kernel in chips.items()
]


@pytest.mark.slow
def test_the_committed_table_is_what_is_compiled():
    if COMMITTED["nvcc"] != resources.release():
        pytest.skip(f"the table is of nvcc {COMMITTED['nvcc']}")
    chips = tuple(CHIPS)
    jobs = [(source, chips[i % len(chips)]) for i, source in enumerate(resources.SOURCES)]
    compiled = resources.table(jobs, resources.launches(_cuda))["kernels"]
    drifted = [
        (name, instantiation, chip)
        for name, instantiations in compiled.items()
        for instantiation, chips in instantiations.items()
        for chip, kernel in chips.items()
        if COMMITTED["kernels"].get(name, {}).get(instantiation, {}).get(chip) != kernel
    ]
    assert not drifted, "python -m tests.cuda.resources writes the table anew; look at what changed"
    assert set(compiled) == set(COMMITTED["kernels"])


def test_no_chip_is_left_out():
    for name, instantiations in COMMITTED["kernels"].items():
        assert all(len(chips) == len(CHIPS) for chips in instantiations.values()), name


def test_no_spills():
    assert not [each for each in EACH if each[3]["spills"]]


def test_shared_memory_fits():
    assert not [each for each in EACH if each[3]["shared"] > CHIPS[each[2]].shared_of_block * 1024]


def test_a_block_fits():
    assert not [each for each in EACH if each[3]["occupancy"] < each[3]["warps"]]
