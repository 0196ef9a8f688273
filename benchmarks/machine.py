"""The machine: what it is, and its limits as measured in this run."""

import datetime
import functools
import importlib.metadata
import math
import pathlib
import platform
import re
import subprocess
import time
from collections.abc import Callable

import torch

_PACKAGES = ("torch", "triton", "numpy", "open-flamingo", "flamingo-pytorch", "flash-attn", "flamingo-kernels")


class Limits:
    """Matmul peak by dtype (FLOP/s) and copy bandwidth by size (bytes/s), each measured when first asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.matmul_flops: dict[torch.dtype, float] = {}
        self.bandwidth_bytes: dict[int, float] = {}  # bytes moved -> bytes per second

    def nearer(self, work: object, dtype: torch.dtype) -> tuple[str, float]:
        """The limit that binds, "matmul" or "bandwidth", and the milliseconds it asks for at least."""
        compute = 1e3 * work.flops / self.matmul(dtype)
        memory = 1e3 * work.bytes / self.bandwidth(work.bytes)
        return ("matmul", compute) if compute >= memory else ("bandwidth", memory)

    def matmul(self, dtype: torch.dtype) -> float:
        """The best over a few square sizes and ways to multiply; on a CPU no less than fp32, to which any can widen."""
        if dtype not in self.matmul_flops:
            narrow = self.device.type == "cpu" and dtype.itemsize < 4
            best = self.matmul(torch.float32) if narrow else 0.0
            for size in (512, 1024, 2048) if self.device.type == "cpu" else (2048, 4096, 8192):
                a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
                for multiply in self._matmuls(dtype):
                    best = max(best, 2 * size**3 / self._best_seconds(functools.partial(multiply, a, b)))
            self.matmul_flops[dtype] = best
        return self.matmul_flops[dtype]

    def bandwidth(self, size: float) -> float:
        """Of a warm copy that moves about as many bytes: small work runs in cache, and so does its limit."""
        nearest = 2 ** min(max(round(math.log2(max(size, 1))), 16), 30)
        if nearest not in self.bandwidth_bytes:
            source = torch.zeros(nearest // 2, dtype=torch.uint8, device=self.device)
            target = torch.zeros_like(source)
            seconds = self._best_seconds(lambda: target.copy_(source))
            self.bandwidth_bytes[nearest] = nearest / seconds
        return self.bandwidth_bytes[nearest]

    def to_json(self) -> dict:
        return {
            "matmul_gflops": {str(d).removeprefix("torch."): v / 1e9 for d, v in self.matmul_flops.items()},
            "copy_gb_per_s_by_bytes_moved": {str(n): v / 1e9 for n, v in sorted(self.bandwidth_bytes.items())},
        }

    def _matmuls(self, dtype: torch.dtype) -> list[Callable]:
        """a·bᵀ; in fp32 also a·b, which some CPUs crawl through in bf16, and oneDNN where torch's own is another."""
        ways = [torch.nn.functional.linear]
        if dtype == torch.float32:
            ways.append(torch.mm)
            onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
            if self.device.type == "cpu" and onednn is not None:
                ways.append(lambda a, b: onednn(a, b, None, "none", [], ""))
        return ways

    def _best_seconds(self, call: Callable[[], object]) -> float:
        best, spent = math.inf, 0.0
        while spent < 0.4:  # long enough to outlast what else the machine does
            start = time.perf_counter()
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            best = min(best, time.perf_counter() - start)
            spent += time.perf_counter() - start
        return best


def describe(device: torch.device) -> dict:
    """Name, threads, versions, commit and date of this run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    threads = torch.get_num_threads()
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", f"{name} {threads} threads".lower()).strip("-"),
        "device": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _cpu_name() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the checkout, with "+" where files differ from it; "unknown" outside a checkout."""
    root = pathlib.Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
