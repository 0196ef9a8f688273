"""The emulated kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer.

The sanitizers' own tests, with planted mistakes, are in tests/cusim.
"""

import os
import shutil
import subprocess
import sys

import pytest

from tests.cusim.build import ROOT, build_module, missing, runtime_of
from tests.support.process import normal_process

pytestmark = [
    normal_process,
    pytest.mark.skipif(missing() is not None, reason=f"the emulator cannot be built here: {missing()}"),
]


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_no_sanitizer_finds_anything(variant: str) -> None:
    build_module(variant)  # not under the sanitizer
    fixed_addresses = ["setarch", "-R"] if shutil.which("setarch") else []  # see tests/cusim/test_planted.py
    plugin = ["-p", "tests.cusim.plugin", f"--cusim={variant}"]
    command = [
        *fixed_addresses,
        sys.executable,
        "-m",
        "pytest",
        *plugin,
        "tests/cuda/test_schedules.py",
        "--capture=sys",
    ]
    environment = {**os.environ, **runtime_of(variant), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert " passed" in done.stdout
    assert "failed" not in done.stdout
