"""Every Triton kernel on every chip from sm_80 to sm_120: nothing in the committed table is too much, and it holds.

What is compiled anew to see whether it holds is each configuration on one of the six chips, which takes a minute and
not six; `python -m tests.triton.resources` compiles all.
"""

import json
import re

import pytest

from tests.support.process import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("a kernel defined under TRITON_INTERPRET=1 cannot be compiled", allow_module_level=True)

import triton

from tests.triton import resources
from tests.triton.chips import CHIPS

COMMITTED = json.loads(resources.TABLE.read_text())
EACH = [
    (name, configuration, int(chip[3:]), kernel)
    for name, configurations in COMMITTED["kernels"].items()
    for configuration, chips in configurations.items()
    for chip, kernel in chips.items()
]
_CLAIM = re.compile(r"Occupancy: (\d+) warps")


@pytest.mark.slow
def test_the_committed_table_is_what_is_compiled():
    if COMMITTED["triton"] != triton.__version__:
        pytest.skip(f"the table is of Triton {COMMITTED['triton']}")
    chips = tuple(CHIPS)
    jobs = [(chips[i % len(chips)], configuration) for i, configuration in enumerate(resources.runs())]
    drifted = [
        (name, configuration, chip)
        for name, configurations in resources.table(jobs)["kernels"].items()
        for configuration, chips in configurations.items()
        for chip, kernel in chips.items()
        if COMMITTED["kernels"].get(name, {}).get(configuration, {}).get(chip) != kernel
    ]
    assert not drifted, "python -m tests.triton.resources writes the table anew; look at what changed"


def test_no_kernel_and_no_chip_is_left_out():
    assert set(COMMITTED["kernels"]) == set(resources.kernels())
    for name, configurations in COMMITTED["kernels"].items():
        assert set(configurations) <= set(resources.runs()), name
        assert all(len(chips) == len(CHIPS) for chips in configurations.values()), name


def test_no_spills():
    assert not [each for each in EACH if each[3]["spills"]]


def test_shared_memory_fits():
    assert not [each for each in EACH if each[3]["shared"] > CHIPS[each[2]].shared_of_block * 1024]


def test_tensor_cores_where_there_are_dots():
    """But in fp32 without tf32, for which there are none."""
    for name, configuration, cc, kernel in EACH:
        expected = name in resources.WITH_DOTS and "ieee" not in configuration
        assert (kernel["matrix"] > 0) == expected, (name, configuration, cc)


def test_occupancy_is_as_claimed():
    """Each kernel's docstring says how many warps a multiprocessor has of it, at the least."""
    claims = {name: int(_CLAIM.search(kernel.fn.__doc__)[1]) for name, kernel in resources.kernels().items()}
    least = {name: min(kernel["occupancy"] for other, *_, kernel in EACH if other == name) for name in claims}
    assert claims == least
