"""What the C++ kernels keep of the memory they worked in."""

import os
import sys

import pytest
import torch

import flamingo_kernels as fk
from tests.support.process import only_cpp

MOST_KEPT = 128 << 20


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has /proc")
@only_cpp
def test_kept_memory_is_bounded(backend):
    """Calls pack operands of 4 to 60 MiB, half a GiB in all; no more than 128 MiB stay, but for what malloc holds."""
    x, weight = torch.ones(15 * 1024, 1024), torch.ones(16, 1024)
    fk.norm_linear(x[:1024], None, None, weight)
    before = _resident_bytes()
    for mebibytes in (*range(4, 61, 4), *range(60, 3, -4)):
        fk.norm_linear(x[: mebibytes * 256], None, None, weight)
    assert _resident_bytes() - before <= MOST_KEPT + (64 << 20)
