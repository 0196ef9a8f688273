"""What every Triton kernel takes of every chip: registers, shared memory, warps that fit, and its matrix instructions.

    python -m tests.triton.resources      writes resources.json, which test_resources.py compares with what it compiles

The ops run as users call them, on shapes that choose each configuration the package ships, on a device that compiles
every launch for its chip and executes nothing.
"""

import concurrent.futures
import importlib
import json
import os
import pathlib
import pkgutil
from collections.abc import Callable, Iterable
from functools import partial
from unittest import mock

import torch
import triton
from triton.runtime.cache import get_cache_manager

import flamingo_kernels as fk
import flamingo_kernels.triton
from flamingo_kernels import _backends
from flamingo_kernels.triton._kernels import add_normalize
from tests.ptx.triton_device import Device
from tests.support import cubin, linear_cases
from tests.triton.chips import CHIPS, occupancy

TABLE = pathlib.Path(__file__).with_name("resources.json")

WITH_DOTS = {
    "masked_cross_attention_fwd_kernel",
    "masked_cross_attention_bwd_kernel",
    "latent_attention_fwd_kernel",
    "latent_attention_bwd_kernel",
    "latent_attention_bwd_tiles_kernel",
}

BF16, FP32 = torch.bfloat16, torch.float32
ATTENTION = [(BF16, 64, ""), (BF16, 128, ""), (BF16, 256, ""), (torch.float16, 64, "")]
ATTENTION += [(FP32, D, precision) for D in (64, 128) for precision in ("tf32", "ieee")]
LINEAR = [
    (BF16, 2048, "gelu"),
    (BF16, 4096, "swiglu"),
    (torch.float16, 8192, "squared_relu"),
    (FP32, 1024, "gelu_tanh"),
    (BF16, 12288, "relu"),
]


def runs() -> dict[str, Callable[[], None]]:
    """By configuration, what launches kernels in it."""
    found = {}
    for dtype, D, precision in ATTENTION:
        name = f"{_short(dtype)}{precision and ' '}{precision} D={D}"
        found[name] = partial(_attention, dtype, D, precision or "ieee")
    for dtype, C, activation in LINEAR:
        found[f"{_short(dtype)} C={C} {activation}"] = partial(_linear, dtype, C, activation)
    return found


def _short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", torch.float16: "fp16", FP32: "fp32"}[dtype]


def _attention(dtype: torch.dtype, D: int, precision: str) -> None:
    def heads(tokens: int) -> torch.Tensor:
        return torch.zeros(1, tokens, 1, D, dtype=dtype, requires_grad=True)

    ends = torch.full((1, 256), 128, dtype=torch.int32)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        fk.masked_cross_attention(heads(256), heads(128), heads(128), (ends - 64, ends)).sum().backward()
        for rows in (64, 128):  # in one tile, and not
            # one program has enough keys to be split, 4096 rows of media have not
            fk.latent_attention(heads(rows), heads(1024), heads(1024), heads(64), heads(64)).sum().backward()
            many = [x.expand(4096, -1, -1, -1) for x in (heads(rows), heads(1), heads(1), heads(64), heads(64))]
            fk.latent_attention(*many).sum().backward()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _linear(dtype: torch.dtype, C: int, activation: str) -> None:
    for op in linear_cases.OPS:
        for gate in ("scalar", "vector") if op != "norm_linear" else (None,):
            case = linear_cases.Case(op, dtype, rows=(64,), C=C, N=1024, gate=gate, activation=activation)
            linear_cases.run_op(case, *case.inputs("cpu"))
    rows, parameters = torch.zeros(2, 64, C, dtype=dtype), torch.zeros(2, C, dtype=dtype)
    add_normalize(*rows, rows[0, 0, :1], *parameters, "layer", 1e-5, dtype, copy=True)
    media = torch.zeros(64, C, dtype=dtype, requires_grad=True)
    weight, norm = torch.zeros(512, C, dtype=dtype, requires_grad=True), torch.zeros(2, C, dtype=dtype)
    ((k, v),) = fk.media_kv(media, [weight], 4, norms=[tuple(norm.requires_grad_())])
    (k.sum() + v.sum()).backward()


class _Compiling(Device):
    """Notes what is launched, and launches nothing."""

    def __init__(self, cc: int) -> None:
        super().__init__(cc, None, None)
        self.launcher_cls = _Noting
        self.compiled: dict[str, dict[str, object]] = {}

    def get_current_device(self) -> str:
        return f"compiler, sm_{self.cc}"  # its own, for Triton keeps launchers by device, and others execute


class _Noting:
    """In the place of a launch, which Triton asks for with what it compiled."""

    def __init__(self, source, metadata) -> None:
        path = get_cache_manager(metadata.hash).get_file(f"{source.name[:150]}.cubin")
        cc = triton.runtime.driver.active.cc
        self.name, self.kernel = metadata.name, _measure(path, metadata, cc)

    def __call__(self, *launch: object) -> None:
        compiled = triton.runtime.driver.active.compiled
        # of several variants in one configuration, the one that takes most
        if self.name not in compiled or self.kernel["registers"] > compiled[self.name]["registers"]:
            compiled[self.name] = self.kernel


def compile_all(job: tuple[int, str]) -> tuple[int, str, dict[str, dict[str, object]]]:
    """(cc, configuration) with the kernels of it, by name."""
    cc, configuration = job
    device = _Compiling(cc)
    torch.set_num_threads(1)
    with mock.patch.object(triton.runtime.driver, "_active", device), mock.patch.object(_backends, "_chosen", "triton"):
        runs()[configuration]()
    return cc, configuration, device.compiled


def table(jobs: Iterable[tuple[int, str]]) -> dict[str, object]:
    """{"triton": version, "kernels": {kernel: {configuration: {chip: what it takes}}}} of (cc, configuration).

    By all cores: a job takes some seconds.
    """
    kernels: dict[str, dict[str, dict[str, object]]] = {}
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        for cc, configuration, compiled in pool.map(compile_all, jobs):
            for name, kernel in compiled.items():
                kernels.setdefault(name, {}).setdefault(configuration, {})[f"sm_{cc}"] = kernel
    return {"triton": triton.__version__, "kernels": dict(sorted(kernels.items()))}


def kernels() -> dict[str, triton.JITFunction]:
    """By name, every kernel that the package defines."""
    found = {}
    for module in pkgutil.iter_modules(flamingo_kernels.triton.__path__):
        for name, value in vars(importlib.import_module(f"flamingo_kernels.triton.{module.name}")).items():
            if name.endswith("_kernel") and isinstance(value, triton.JITFunction):
                found[name] = value
    return found


def _measure(path: str, metadata, cc: int) -> dict[str, object]:
    (kernel,) = cubin.functions(path).values()
    return {
        "warps": metadata.num_warps,
        "registers": kernel["registers"],
        "shared": metadata.shared,
        "spills": kernel["spills"],
        "matrix": kernel["matrix"],
        "occupancy": occupancy(cc, metadata.num_warps, kernel["registers"], metadata.shared),
    }


if __name__ == "__main__":
    everything = table([(cc, configuration) for configuration in runs() for cc in CHIPS])
    TABLE.write_text(json.dumps(everything, indent=1) + "\n")
    print("wrote", TABLE.name)
