"""What comes of an install from the source distribution: with no compiler, with no extension wanted, with no torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools

from tests.support.process import normal_process

pytestmark = normal_process

# Calls the op three times and prints its error, and every warning of ours that was given.
USE = """
import json, warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import flamingo_kernels as fk
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 6, 4, 8)
    intervals = fk.Intervals(torch.zeros(2, 3, dtype=torch.int32), torch.full((2, 3), 6, dtype=torch.int32))
    for _ in range(3):
        o = fk.masked_cross_attention(q, k, k, intervals)
q, k = q.transpose(1, 2), k.transpose(1, 2)
expected = torch.nn.functional.scaled_dot_product_attention(q, k, k).transpose(1, 2)
print(json.dumps({
    "file": fk.__file__,
    "error": (o - expected).abs().max().item(),
    "cpu": fk.backends()["cpu"],
    "warnings": [str(w.message) for w in caught if "flamingo_kernels" in str(w.message)],
}))
"""


@pytest.fixture
def install(source: Path, tmp_path: Path, run: Callable) -> Callable[..., Path]:
    """install(NAME=value...): pip install into a directory of its own, which is returned."""

    def install(**environment: str) -> Path:
        target = tmp_path / "target"
        options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", target)
        done = run(sys.executable, "-m", "pip", "install", *options, source, cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        return target

    return install


def use(run: Callable, target: Path, tmp_path: Path) -> dict:
    done = run(sys.executable, "-c", USE, cwd=tmp_path, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    assert Path(used["file"]).is_relative_to(target)
    assert used["error"] < 1e-6
    return used


@pytest.mark.slow
def test_a_failing_compiler_gives_a_working_install_and_one_warning(
    install: Callable, run: Callable, tmp_path: Path
) -> None:
    target = install(CXX="/bin/false")
    assert not list(target.glob("flamingo_kernels/*.so"))
    used = use(run, target, tmp_path)
    (warning,) = used["warnings"]
    assert "/bin/false failed" in warning
    assert "/bin/false failed" in used["cpu"]

    shown = run(sys.executable, "-m", "flamingo_kernels", cwd=tmp_path, PYTHONPATH=str(target))
    assert shown.returncode == 0, shown.stderr
    lines = dict(line.split("  ", 1) for line in shown.stdout.splitlines())
    assert "/bin/false failed" in lines["build"]
    assert lines["backend reference"].strip() == "available"
    assert "/bin/false failed" in lines["backend cpu"]


@pytest.mark.slow
def test_no_extension_wanted_gives_no_warning(install: Callable, run: Callable, tmp_path: Path) -> None:
    target = install(FLAMINGO_KERNELS_BUILD="none")
    assert not list(target.glob("flamingo_kernels/*.so"))
    used = use(run, target, tmp_path)
    assert used["warnings"] == []
    assert used["cpu"] == "the C++ extension was not built: FLAMINGO_KERNELS_BUILD=none"


def test_missing_torch_says_what_to_type_and_nothing_else(source: Path, run: Callable, tmp_path: Path) -> None:
    # an environment that holds setuptools and no torch
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (packages,) = tmp_path.glob("venv/lib/python*/site-packages")
    installed = Path(setuptools.__file__).parents[1]
    for path in (*installed.glob("setuptools*"), installed / "_distutils_hack"):
        (packages / path.name).symlink_to(path)
    hook = "from setuptools import build_meta as b; b.prepare_metadata_for_build_wheel('.')"
    done = run(tmp_path / "venv/bin/python", "-c", hook, cwd=source)
    assert done.returncode != 0
    assert "pip install torch==2.13.0" in done.stderr
    assert "uv pip install --no-build-isolation ." in done.stderr
    assert "Traceback" not in done.stderr
