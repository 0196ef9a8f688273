"""What every CUDA kernel takes of every chip: registers, shared memory, warps that fit, wide and matrix instructions.

    python -m tests.cuda.resources      writes resources.json

nvcc compiles the sources for each chip. How large a block is and how much shared memory it gets is what the ops launch,
on the emulator, with shapes that choose each instantiation that the package ships.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from types import ModuleType

import torch

import flamingo_kernels as fk
from flamingo_kernels import _backends
from tests.cusim.build import ROOT, cuda_headers, install
from tests.support import attention_cases, cubin, latent_attention_cases, linear_cases, media_kv_cases
from tests.triton.chips import CHIPS, occupancy

TABLE = pathlib.Path(__file__).with_name("resources.json")
SOURCES = sorted(source.name for source in (ROOT / "csrc" / "cuda").glob("*.cu"))
_WIDE = {"loads": r"\bLDG\.\S*128\b", "stores": r"\bSTG\.\S*128\b", "copies": r"\bLDGSTS\.\S*128\b"}

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def nvcc() -> str | None:
    """nvcc, of the directory whose headers the emulator takes, or None."""
    beside = cuda_headers() and shutil.which("nvcc", path=str(cuda_headers().parent / "bin"))
    return beside or shutil.which("nvcc")


def release() -> str:
    """nvcc's version."""
    said = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", said)[1]


def launch_all() -> None:
    """Launch every kernel, in every instantiation, with as much shared memory as it ever gets."""
    for dtype, precision in ((BF16, "ieee"), (FP16, "ieee"), (FP32, "ieee"), (FP32, "tf32")):
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = precision
        try:
            for D in (64, 96, 128):
                _attention(dtype, D)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        _linear(dtype)


def _attention(dtype: torch.dtype, D: int) -> None:
    for T, H in ((3, 1), (1, 1), (1, 2)):  # training, and decoding of one head and of several for each key head
        attention_cases.run_op(attention_cases.Case(dtype, "full", B=1, T=T, H=H, G=1, D=D, M=1, L=8).inputs("cpu"))
    if _backends._has("cuda", "latent_attention"):
        case = latent_attention_cases.LatentCase(dtype, "none", N=1, S=200, R=3, H=1, G=1, D=D)  # in two parts
        latent_attention_cases.run_op(case.inputs("cpu"))


def _linear(dtype: torch.dtype) -> None:
    for streams in {dtype, FP32}:
        for C in (33, 8192):  # read again, and held in registers
            for norm in ("layer", "rms"):
                for op in linear_cases.OPS:
                    for gate in ("scalar", "vector") if op != "norm_linear" else (None,):
                        case = linear_cases.Case(op, dtype, streams, rows=(2,), C=C, N=8, norm=norm, gate=gate)
                        linear_cases.run_op(case, *case.inputs("cpu"))
        for activation in linear_cases.ACTIVATIONS:
            for N in (72, 73):  # in groups, and one by one
                case = linear_cases.Case("gated_mlp", dtype, streams, rows=(2,), C=8, N=N, activation=activation)
                linear_cases.run_op(case, *case.inputs("cpu"))
        for V in (40, 41):
            media_kv_cases.run_op(media_kv_cases.MediaCase(dtype, streams, rows=(2,), V=V).inputs("cpu"))
        _gated_rows_apart(dtype, streams)


def _gated_rows_apart(dtype: torch.dtype, streams: torch.dtype) -> None:
    """linear_gate_residual of rows that are neither groups of 16 bytes nor one piece."""
    x = torch.ones(2, 40, dtype=dtype)[:, :33].detach().requires_grad_()
    weight = torch.ones(8, 33, dtype=dtype, requires_grad=True)
    gate = torch.ones((), dtype=streams, requires_grad=True)
    y = fk.linear_gate_residual(x, weight, torch.ones(2, 8, dtype=streams), gate)
    torch.autograd.grad(y.sum(), (x, weight, gate))


def launches(module: ModuleType) -> dict[str, tuple[int, int]]:
    """By kernel of the emulated module, the threads of a block and its bytes of shared memory, the most of each."""
    module.emulator.reset()
    with fk.use_backend("cuda"):
        launch_all()
    found: dict[str, tuple[int, int]] = {}
    for kernel, threads, shared in module.emulator.launches():
        before = found.get(kernel, (0, 0))
        found[kernel] = (max(threads, before[0]), max(shared, before[1]))
    return found


def compile_one(job: tuple[str, int]) -> tuple[int, dict[str, dict[str, object]]]:
    """(source, cc): cc, and by kernel what it takes of the chip."""
    source, cc = job
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "kernels.cubin"
        flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{cc}", "-cubin", "-o", str(path)]
        subprocess.run([nvcc(), *flags, str(ROOT / "csrc" / "cuda" / source)], check=True)
        found = cubin.functions(path)
    return cc, dict(zip(readable(list(found)), found.values(), strict=True))


def readable(symbols: Sequence[str]) -> list[str]:
    """Symbols as C++ writes them."""
    said = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return said.splitlines()


def table(jobs: Iterable[tuple[str, int]], launched: dict[str, tuple[int, int]]) -> dict[str, object]:
    """{"nvcc": version, "kernels": {kernel: {instantiation: {chip: what it takes}}}} of (source, cc)."""
    kernels: dict[str, dict[str, dict[str, object]]] = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for cc, compiled in pool.map(compile_one, jobs):
            for symbol, kernel in compiled.items():
                name, instantiation = parts(symbol)
                if symbol not in launched:
                    raise LookupError(f"{symbol} is compiled, but launch_all does not launch it")
                threads, shared = launched[symbol]
                takes = _takes(cc, threads, shared, kernel)
                kernels.setdefault(name, {}).setdefault(instantiation, {})[f"sm_{cc}"] = takes
    return {"nvcc": release(), "kernels": dict(sorted(kernels.items()))}


def parts(symbol: str) -> tuple[str, str]:
    """Of "void flamingo::f<types>(Params<types>)": f, and types."""
    name, types = re.fullmatch(r"(?:void )?(?:flamingo::)?(\w+)(?:<(.*)>)?\(.*\)", symbol).groups()
    return name, (types or "").replace("flamingo::", "")


def _takes(cc: int, threads: int, shared: int, kernel: dict[str, object]) -> dict[str, object]:
    return {
        "warps": threads // 32,
        "registers": kernel["registers"],
        "shared": shared,
        "spills": kernel["spills"],
        "matrix": kernel["matrix"],
        **{name: len(re.findall(pattern, kernel["code"])) for name, pattern in _WIDE.items()},
        "occupancy": occupancy(cc, threads // 32, kernel["registers"], shared),
    }


if __name__ == "__main__":
    everything = table([(source, cc) for source in SOURCES for cc in CHIPS], launches(install("plain")))
    TABLE.write_text(json.dumps(everything, indent=1) + "\n")
    print("wrote", TABLE.name)
