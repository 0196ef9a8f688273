"""A patched module keeps half of what the original keeps for backward, or less, besides inputs and parameters."""

import pytest

import flamingo_kernels as fk
from benchmarks.memory import saved_bytes
from tests.patch import foreign
from tests.patch.foreign import LOCATIONS, family
from tests.support.process import normal_process

pytestmark = normal_process


CASES = {
    "open_flamingo": (family("open_flamingo", media_locations=LOCATIONS), 0.5),
    "otter": (family("otter", media_locations=LOCATIONS), 0.5),
    "idefics": (foreign.idefics(), 0.5),
    "mllama": (foreign.mllama(), 0.5),
    "open_flamingo-resampler": (foreign.resampler("open_flamingo"), 0.5),
    "idefics-resampler": (foreign.idefics_resampler(), 0.55),  # eager code keeps little of a relu
}


@pytest.mark.parametrize("case", CASES)
def test_half_or_less(case):
    case, most = CASES[case]
    module = case.module()
    leaves = (*case.inputs().values(), *module.parameters())

    def kept() -> int:
        return saved_bytes(lambda *given: case.call(module, dict(zip(case.shapes, given, strict=False))), leaves)[0]

    before = kept()
    fk.patch(module)
    assert kept() <= most * before
