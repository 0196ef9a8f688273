"""The kernels as nvcc compiles them: their PTX runs in the interpreter of tests/ptx, beside the emulator."""

import contextlib
import functools
import hashlib
import re
import subprocess
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import numpy as np
import torch

from tests.cuda.resources import SOURCES, nvcc, readable, release
from tests.cusim.build import ROOT
from tests.ptx.code import Code
from tests.ptx.machine import Launch
from tests.ptx.memory import Global
from tests.ptx.parser import parse
from tests.ptx.program import extent


@contextlib.contextmanager
def beside_the_emulator(module: ModuleType, cc: int, seed: int) -> Iterator[list[str]]:
    """Inside, each launch also runs from its PTX for sm_<cc>, on copies of the tensors, which must come out alike.

    What a kernel may access are the tensors whose address the package asked for. Gives the names of the kernels that
    ran so.

    Raises: AssertionError, where a tensor differs; PtxError, where the PTX does what no chip does.
    """
    ran: list[str] = []
    tensors: dict[int, torch.Tensor] = {}  # by address; kept, so that no address is given out twice
    copies: dict[int, np.ndarray] = {}
    data_ptr = torch.Tensor.data_ptr

    def noted(x: torch.Tensor) -> int:
        address = data_ptr(x)
        before = tensors.get(address)
        if before is None or extent(before).size < extent(x).size:
            tensors[address] = x
        return address

    def launch(kernel: str, grid: tuple[int, int, int], threads: int, shared: int, parameters: bytes) -> None:
        memory, words = Global(), np.frombuffer(parameters, np.uint64).copy()
        copies.clear()
        for i, word in enumerate(words.tolist()):
            for address, x in tensors.items():
                if word and address <= word < address + max(extent(x).size, 1):
                    if address not in copies:
                        copies[address] = _copy(extent(x), address)
                        pointers[address] = memory.add(f"tensor {list(x.shape)} of {x.dtype}", copies[address])
                    words[i] = pointers[address] + word - address
                    break
        ran.append(kernel)
        Launch(_code(kernel, cc), grid, threads, shared, [words.tobytes()], memory, seed).run()

    def compare() -> None:
        for address, copy in copies.items():
            _assert_alike(ran[-1], tensors[address], copy)

    pointers: dict[int, int] = {}
    with mock.patch.object(torch.Tensor, "data_ptr", noted), module.emulator.observed(launch, compare):
        yield ran


def _copy(x: np.ndarray, address: int) -> np.ndarray:
    """At an address that is as aligned as the one given."""
    room = np.empty(x.size + 512, np.uint8)
    start = (address - room.ctypes.data) % 256
    room[start : start + x.size] = x
    return room[start : start + x.size]


def _assert_alike(kernel: str, x: torch.Tensor, copy: np.ndarray) -> None:
    """Integers to the bit; of floats, the largest difference against the largest value."""
    if np.array_equal(extent(x), copy):
        return
    assert x.dtype.is_floating_point, f"{kernel}: integers differ"
    a, b = (torch.from_numpy(y).view(x.dtype).double() for y in (extent(x).copy(), copy.copy()))
    assert torch.equal(a.isfinite(), b.isfinite()), f"{kernel}: finite in other places"
    a, b = a[a.isfinite()], b[b.isfinite()]
    worst, largest = (a - b).abs().max().item(), b.abs().max().item()
    behind = x.dtype == torch.float32 and _16_BITS.search(kernel)
    allowed = (ULP_OF_FP32_BEHIND_16_BITS if behind else ULP[x.dtype]) * torch.finfo(x.dtype).eps * largest
    assert worst <= allowed, f"{kernel} ({list(x.shape)} {x.dtype}): {worst:.3e} apart, {allowed:.3e} allowed"


# In units of the last place of the largest value. nvcc fuses products and sums, and exp2 and its like are rounded
# otherwise, so that what is rounded to 16 bits, as an output or on the way to one, may fall to the other side.
ULP = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 32}
ULP_OF_FP32_BEHIND_16_BITS = 256
_16_BITS = re.compile(r"__half|__nv_bfloat16|Precision\)[23]")


@functools.cache
def _code(kernel: str, cc: int) -> Code:
    text, symbol = kernels(cc)[kernel]
    return Code(parse(text, symbol))


def forget() -> None:
    """What was compiled is looked up anew."""
    kernels.cache_clear()
    _code.cache_clear()


@functools.cache
def kernels(cc: int) -> dict[str, tuple[str, str]]:
    """By readable name: the PTX of the source that has the kernel, and its symbol there."""
    found = {}
    for source in SOURCES:
        text = compiled(source, cc)
        symbols = re.findall(r"\.entry\s+([\w$]+)", text)
        found |= {name: (text, symbol) for name, symbol in zip(readable(symbols), symbols, strict=True)}
    return found


def compiled(source: str, cc: int) -> str:
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
