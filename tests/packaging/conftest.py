"""The source distribution, and Python processes that know nothing of this repository."""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_NOT_SOURCE = (".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_build.json", "local", "demo-output")


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess]:
    """run(python, *arguments, cwd=..., NAME=value...): a process without our variables in its environment."""

    def run(python: str | Path, *arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
        ours = ("FLAMINGO_", "PYTHON", "CXX", "MAX_JOBS", "TRITON_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        command = [str(python), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env={**kept, **environment}, capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, run: Callable) -> Path:
    """The unpacked source distribution, made from a copy because setuptools writes beside setup.py."""
    directory = tmp_path_factory.mktemp("source")
    copy, out = directory / "copy", directory / "sdist"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*_NOT_SOURCE))
    out.mkdir()
    done = run(sys.executable, "-c", f"from setuptools import build_meta as b; b.build_sdist({str(out)!r})", cwd=copy)
    assert done.returncode == 0, done.stderr
    (packed,) = out.iterdir()
    with tarfile.open(packed) as archive:
        archive.extractall(directory)
    return directory / packed.name.removesuffix(".tar.gz")


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict]:
    """setup_script(): the names that setup.py defines, without anything being built."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return lambda: runpy.run_path(str(ROOT / "setup.py"))
