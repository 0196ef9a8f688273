"""The C++ extension built with a sanitizer, by setup.py, in a directory of its own."""

import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType
from unittest import mock

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = {
    "address": ["-fsanitize=address,undefined,float-cast-overflow", "-D_GLIBCXX_ASSERTIONS"],
    "thread": ["-fsanitize=thread", "-Wno-tsan"],
}


def build(sanitizer: str) -> Path:
    """The library, every instruction set of it sanitized, with the planted errors in it."""
    setup = _setup()
    ours = setup.sources()
    setup.sources = lambda: [*ours, HERE / "planted.cpp"]
    with mock.patch.dict(os.environ, CXXFLAGS=f"-O1 -g1 -fno-omit-frame-pointer {os.environ.get('CXXFLAGS', '')}"):
        cxx = [*setup.compiler(), *FLAGS[sanitizer], f"-I{HERE / 'include'}"]
        return setup.build_library(cxx, ROOT / "build" / "sanitizers" / sanitizer)


def runtime(sanitizer: str) -> str:
    """What a Python without sanitizers must load first. The C++ library comes along, whose throw is intercepted."""
    names = [f"lib{sanitizer[0]}san.so", "libstdc++.so"]
    cxx = _setup().compiler()
    found = (subprocess.run([*cxx, f"-print-file-name={n}"], capture_output=True, text=True).stdout for n in names)
    return " ".join(path.strip() for path in found)


def _setup() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("flamingo_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(module)
    return module
