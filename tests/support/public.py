"""The public Flamingo packages, for tests that compare with them."""

import importlib
import importlib.util
import pathlib
import sys
from types import ModuleType

import pytest

_OPEN_FLAMINGO = "open_flamingo_src"


def public(name: str) -> ModuleType:
    """The file of "flamingo_pytorch" or "open_flamingo" that holds blocks and resamplers."""
    pytest.importorskip("einops_exts", reason="the public Flamingo packages need einops-exts (extra: bench)")
    if name == "flamingo_pytorch":
        return pytest.importorskip("flamingo_pytorch.flamingo_pytorch", reason="flamingo-pytorch is not installed")
    return open_flamingo("helpers")


def open_flamingo(name: str) -> ModuleType:
    """One file of open_flamingo/src, without what the package imports at its top, which is far more."""
    found = importlib.util.find_spec("open_flamingo")
    if found is None:
        pytest.skip("open-flamingo is not installed")
    package = ModuleType(_OPEN_FLAMINGO)
    package.__path__ = [str(pathlib.Path(found.origin).parent / "src")]
    sys.modules.setdefault(_OPEN_FLAMINGO, package)
    return importlib.import_module(f"{_OPEN_FLAMINGO}.{name}")
