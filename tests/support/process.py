"""Which kind of process the tests run in: a normal one, or the (slow) Triton interpreter."""

import os
from collections.abc import Sequence

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16) + (() if INTERPRETED else (torch.float64,))

normal_process = pytest.mark.skipif(INTERPRETED, reason="runs in the normal process, where it means the same")


def pick(normal: Sequence, interpreted: Sequence) -> Sequence:
    """The cases of this process: all of them, or the few that an interpreter gets through."""
    return interpreted if INTERPRETED else normal
