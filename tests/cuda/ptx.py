"""The kernels as nvcc compiles them: their PTX runs in the interpreter of tests/ptx, beside the emulator."""

import contextlib
import functools
import hashlib
import re
import subprocess
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch

from tests.cuda.resources import SOURCES, nvcc, readable, release
from tests.cusim.build import ROOT
from tests.cusim.margins import MARGIN, Margins
from tests.ptx.code import Code
from tests.ptx.machine import Launch
from tests.ptx.memory import Global
from tests.ptx.parser import parse


@contextlib.contextmanager
def beside_the_emulator(module: ModuleType, made: Margins, cc: int, seed: int) -> Iterator[list[str]]:
    """Inside, each launch also runs from its PTX for sm_<cc>, on copies of all tensors of `made`.

    They must come out alike. Gives the names of the kernels that ran so.

    Raises: AssertionError, where a tensor differs; PtxError, where the PTX does what no chip does.
    """
    ran: list[str] = []
    copies: list[np.ndarray] = []

    def compare() -> None:
        for (storage, _, dtype), copy in zip(made.storages, copies, strict=True):
            _assert_alike(ran[-1], storage.numpy(), copy, dtype)

    def launch(kernel: str, grid: tuple[int, int, int], threads: int, shared: int, parameters: bytes) -> None:
        memory, words = Global(), np.frombuffer(parameters, np.uint64).copy()
        addresses = words.copy()
        copies[:] = [storage.numpy().copy() for storage, _, _ in made.storages]
        for i, ((storage, size, _), copy) in enumerate(zip(made.storages, copies, strict=True)):
            start = storage.data_ptr() + MARGIN
            inside = (addresses >= start) & (addresses < start + max(size, 1))
            pointer = memory.add(f"tensor {i}", copy[MARGIN : MARGIN + size])
            words[inside] = addresses[inside] - np.uint64(start) + np.uint64(pointer)
        ran.append(kernel)
        Launch(_code(kernel, cc), grid, threads, shared, [words.tobytes()], memory, seed).run()

    with module.emulator.observed(launch, compare):
        yield ran


def _assert_alike(kernel: str, actual: np.ndarray, expected: np.ndarray, dtype: torch.dtype) -> None:
    """Integers and margins to the bit; of floats, the largest difference against the largest value."""
    if np.array_equal(actual, expected):
        return
    of = torch.from_numpy
    assert dtype.is_floating_point, f"{kernel}: integers differ"
    a, b = (of(x)[MARGIN:-MARGIN].view(dtype).double() for x in (actual, expected))
    assert np.array_equal(actual[:MARGIN], expected[:MARGIN])
    assert np.array_equal(actual[-MARGIN:], expected[-MARGIN:])
    assert torch.equal(a.isfinite(), b.isfinite()), f"{kernel}: finite in other places"
    a, b = a[a.isfinite()], b[b.isfinite()]
    worst, largest = (a - b).abs().max().item(), b.abs().max().item()
    allowed = ULP[dtype] * torch.finfo(dtype).eps * largest
    assert worst <= allowed, f"{kernel} ({dtype}): {worst:.3e} apart, {allowed:.3e} allowed"


# In units of the last place of the largest value. nvcc fuses products and sums, and exp2 and its like are rounded
# otherwise, so that results of 16 bits may fall to the other side.
ULP = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 32}


@functools.cache
def _code(kernel: str, cc: int) -> Code:
    text, symbol = _symbols(cc)[kernel]
    return Code(parse(text, symbol))


@functools.cache
def _symbols(cc: int) -> dict[str, tuple[str, str]]:
    """By readable name: the PTX of the source that has the kernel, and its symbol there."""
    found = {}
    for source in SOURCES:
        text = _compiled(source, cc)
        symbols = re.findall(r"\.entry\s+([\w$]+)", text)
        found |= {name: (text, symbol) for name, symbol in zip(readable(symbols), symbols, strict=True)}
    return found


def _compiled(source: str, cc: int) -> str:
    """PTX, kept in build/ for as long as nothing in csrc/cuda changes."""
    folder = ROOT / "csrc" / "cuda"
    headers = b"".join(path.read_bytes() for path in sorted(folder.glob("*.*h")))
    key = hashlib.sha256(headers + (folder / source).read_bytes() + release().encode()).hexdigest()[:16]
    path = ROOT / "build" / "ptx" / f"{source}.{cc}.{key}.ptx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f"{source}.{cc}.*"):
            old.unlink()
        flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{cc}", "-ptx", "-o", str(path)]
        subprocess.run([nvcc(), *flags, str(folder / source)], check=True)
    return path.read_text()
