"""A device for Triton that is no GPU: it compiles each launch for a chip and runs the PTX on CPU tensors.

    with executed_on(cc=90, seed=0) as ran:
        o = fk.masked_cross_attention(q, k, v, intervals)
    assert "wgmma" in ran["masked_cross_attention_fwd_kernel"]

Triton asks its driver which device there is, and how a compiled kernel is launched there. This driver answers both, so
that everything before the launch is Triton's own doing: what is specialised, cached and compiled is what a GPU gets.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

from flamingo_kernels import _backends
from tests.ptx.program import Program
from tests.triton.chips import CHIPS

WARP = 32


@contextlib.contextmanager
def executed_on(cc: int, seed: int | None = 0, edit: Callable[[str], str] | None = None) -> Iterator[dict[str, str]]:
    """Run the ops of flamingo_kernels on the triton backend, as compiled for compute capability `cc`, such as 90.

    seed: the order of blocks and warps, as in Program.run. edit: changes a kernel's PTX before it runs.

    Gives the PTX of each kernel that ran inside, by the kernel's name.
    """
    device = Device(cc, seed, edit)
    with mock.patch.object(triton.runtime.driver, "_active", device), mock.patch.object(_backends, "_chosen", "triton"):
        yield device.ran


class Device(DriverBase):
    """What Triton needs of a driver."""

    def __init__(self, cc: int, seed: int | None, edit: Callable[[str], str] | None) -> None:
        self.cc, self.seed, self.edit = cc, seed, edit
        self.ran: dict[str, str] = {}
        self.utils = _Utils()
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return False  # never by itself

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("kernels are launched without C++")

    def get_benchmarker(self):
        raise NotImplementedError("an interpreter has no speed worth measuring")

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.cc, WARP)

    def get_current_device(self) -> str:
        return f"ptx interpreter, sm_{self.cc}"  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: str) -> int:
        return 0


class _Utils:
    """Loading a binary, of which there is no need: the launcher reads the PTX that it was assembled from."""

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": CHIPS[int(device.rpartition("_")[2])].shared_of_block * 1024}

    def load_binary(self, name: str, binary: bytes, shared: int, device: str) -> tuple:
        return name, name, 0, 0, 1024  # module, function, registers, spills, threads of the largest block

    def unload_module(self, module: str) -> None:
        pass


class _Launcher:
    """Called by Triton once for each launch of one compiled kernel."""

    def __init__(self, source, metadata) -> None:
        self.names = [name for name, kind in source.signature.items() if kind != "constexpr"]
        self.constant = [kind == "constexpr" for kind in source.signature.values()]
        self.metadata = metadata
        path = get_cache_manager(metadata.hash).get_file(f"{source.name[:150]}.ptx")
        self.ptx = pathlib.Path(path).read_text()

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *arguments) -> None:
        device = triton.runtime.driver.active
        passed = [a for a, constant in zip(arguments, self.constant, strict=True) if not constant]
        ptx = device.edit(self.ptx) if device.edit else self.ptx
        Program.parse(ptx).run(
            (x, y, z),
            dict(zip(self.names, passed, strict=True)) | {"global scratch": 0, "profile scratch": 0},
            threads=self.metadata.num_warps * WARP,
            shared_bytes=self.metadata.shared,
            seed=device.seed,
        )
        device.ran[self.metadata.name] = ptx
