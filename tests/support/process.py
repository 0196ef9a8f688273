"""Which kind of process the tests run in: a normal one, or a slow one that runs a GPU's kernels on the CPU.

Slow ones are the Triton interpreter (TRITON_INTERPRET=1) and the emulator of CUDA C++ (pytest -p tests.cusim.plugin).
"""

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch

import flamingo_kernels as fk

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = getattr(sys.modules.get("flamingo_kernels._cuda"), "emulated", False)
SLOW = INTERPRETED or EMULATED
DTYPES = (torch.float32, torch.bfloat16, torch.float16) + (() if SLOW else (torch.float64,))


class Backend(NamedTuple):
    """A backend that is in force while the test runs, and the device for its tensors."""

    name: str
    device: str


normal_process = pytest.mark.skipif(SLOW, reason="runs in the normal process, where it means the same")
only_cpp = pytest.mark.parametrize("backend", [] if SLOW else [Backend("cpu", "cpu")], indirect=True, ids=str)


def pick(normal: Sequence, slow: Sequence) -> Sequence:
    """The cases of this process: all of them, or the few that a slow one gets through."""
    return slow if SLOW else normal


def require(name: str) -> None:
    """Fail where a backend cannot run, since a test left out looks like one that passes; skip if none was asked for."""
    state = fk.backends()[name]
    if state == "available":
        return
    reason = f"backend {name!r} cannot run here: {state}"
    if os.environ.get("FLAMINGO_KERNELS_BUILD") == "none":
        pytest.skip(reason)
    pytest.fail(reason)
