"""Every CUDA kernel on every chip from sm_80 to sm_120: nothing in the committed table is too much, and it holds.

What is compiled anew to see whether it holds is each source for one of the six chips; `python -m tests.cuda.resources`
compiles all.
"""

import json
import re

import pytest

from tests.support.process import EMULATED

pytest.importorskip("triton")  # whose wheel has the tools that read cubins
if not EMULATED:
    pytest.skip("asks the emulator for launches (pytest -p tests.cusim.plugin)", allow_module_level=True)

from flamingo_kernels import _cuda
from tests.cuda import resources
from tests.cusim.build import ROOT
from tests.triton.chips import CHIPS

if resources.nvcc() is None:
    pytest.skip("nvcc is not installed", allow_module_level=True)

WITH_PRODUCTS = {
    f"{op}_{kernel}_kernel"
    for op, kernels in {"masked_cross_attention": ("fwd", "decode", "bwd"), "latent_attention": ("fwd", "bwd")}.items()
    for kernel in kernels
}
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


def test_matrix_instructions_where_there_are_products():
    """But in fp32 without tf32, for which there are none."""
    for name, instantiation, cc, kernel in EACH:
        expected = name in WITH_PRODUCTS and not instantiation.startswith("(Precision)0")
        assert (kernel["matrix"] > 0) == expected, (name, instantiation, cc)


def test_memory_is_moved_16_bytes_at_a_time():
    """By attention into shared memory and out; by kernels on rows, wherever these come in groups of 16 bytes.

    Where a row in fp32 stands beside one in 16 bits, groups of four take 8 bytes of the latter.
    """
    for name, instantiation, cc, kernel in EACH:
        where = (name, instantiation, cc)
        if name in WITH_PRODUCTS:
            assert kernel["copies"], where
            assert kernel["stores"], where
        elif instantiation.endswith(", 8") or (instantiation.endswith(", 4") and "__" not in instantiation):
            assert kernel["loads"], where
            assert kernel["stores"], where


def test_occupancy_is_as_claimed():
    """In front of each kernel stands how many warps a multiprocessor has of it, at the least."""
    least = {
        name: min(kernel["occupancy"] for other, *_, kernel in EACH if other == name) for name in COMMITTED["kernels"]
    }
    assert {name: _claim(name) for name in least} == least


def _claim(kernel: str) -> int:
    for source in (ROOT / "csrc" / "cuda").glob("*.cuh"):
        before, found, _ = source.read_text().partition(f"{kernel}(")
        if found:
            return int(re.findall(r"Occupancy: (\d+) warps on a multiprocessor, or more", before)[-1])
    raise LookupError(f"{kernel} is in no header")
