"""The interpreter computes as a GPU does once it is mended, and not before."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.support.process import normal_process

triton = pytest.importorskip("triton")

pytestmark = normal_process
ARITHMETIC = ("bf16_dot", "bf16_rounding", "tf32_dot")


@functools.cache
def _right(*arguments: str) -> dict[str, bool]:
    """What a fresh interpreter process finds right."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton.interpreted_arithmetic", *arguments],
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_mended_interpreter_is_right(arithmetic):
    assert _right("mend")[arithmetic]


def test_mend_is_still_needed():
    needless = [arithmetic for arithmetic in ARITHMETIC if _right()[arithmetic]]
    assert not needless, (
        f"Triton {triton.__version__} gets {', '.join(needless)} right by itself: that part of the mend in "
        "tests/triton/interpreter.py can go"
    )
