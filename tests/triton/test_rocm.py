"""Every Triton kernel compiles for AMD's gfx90a and gfx942, by the backend that Triton brings along. None ran there.

In one configuration each, on a device that executes nothing. Warps have 64 lanes there.
"""

import pathlib
import re
from unittest import mock

import pytest

from tests.support.process import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("a kernel defined under TRITON_INTERPRET=1 cannot be compiled", allow_module_level=True)
pytest.importorskip("triton.backends.amd")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from flamingo_kernels import _backends
from tests.ptx.triton_device import Device
from tests.triton import resources

ARCHITECTURES = ("gfx90a", "gfx942")  # MI200 and MI300
CONFIGURATIONS = ("bf16 D=64", "bf16 C=2048 gelu", "bf16 C=12288 relu")
SHARED = 64 * 1024  # bytes that a block may have


class _Amd(Device):
    """Notes what is compiled for one architecture, and launches nothing."""

    def __init__(self, architecture: str) -> None:
        super().__init__(cc=0, seed=None, edit=None)
        self.architecture, self.launcher_cls = architecture, _Noting
        self.utils.get_device_properties = lambda device: {"max_shared_mem": SHARED}
        self.compiled: dict[str, tuple[object, str]] = {}  # metadata and assembly

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", self.architecture, 64)

    def get_current_device(self) -> str:
        return f"compiler, {self.architecture}"


class _Noting:
    """In the place of a launch."""

    def __init__(self, source, metadata) -> None:
        path = get_cache_manager(metadata.hash).get_file(f"{source.name[:150]}.amdgcn")
        self.metadata, self.assembly = metadata, pathlib.Path(path).read_text()

    def __call__(self, *launch: object) -> None:
        triton.runtime.driver.active.compiled[self.metadata.name] = self.metadata, self.assembly


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles(architecture):
    device = _Amd(architecture)
    with mock.patch.object(triton.runtime.driver, "_active", device), mock.patch.object(_backends, "_chosen", "triton"):
        for configuration in CONFIGURATIONS:
            resources.runs()[configuration]()
    assert set(device.compiled) == set(resources.kernels())
    for name, (metadata, assembly) in device.compiled.items():
        assert metadata.warp_size == 64
        assert metadata.shared <= SHARED, name
        assert ("v_mfma" in assembly) == (name in resources.WITH_DOTS), name
        spilled = [int(count) for count in re.findall(r"\.vgpr_spill_count: +(\d+)", assembly)]
        assert spilled == [0], name
