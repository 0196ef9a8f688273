"""Builds what runs under the emulator, plain or with sanitizers, and puts the emulated `_cuda` in the module's place.

`install()` is what most want. What it built lies in build/cusim, where a second call finds it.
"""

import fcntl
import functools
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from tests.cusim.emulator import Emulator

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUNTIME = sorted(HERE.glob("*.cpp"))
MODULE = "flamingo_kernels._cuda"
_UNDEFINED = "-fsanitize=undefined,float-cast-overflow -fno-sanitize-recover=undefined,float-cast-overflow"
# Flags of kernels (.cu) and of the emulator's runtime, which ThreadSanitizer must not see. Kernels are many
# instantiations that run for a moment: with AddressSanitizer, optimising them takes longer than it saves.
VARIANTS = {
    "plain": ("-O2", "-O2"),
    "asan": (f"-O0 -fno-omit-frame-pointer -fsanitize=address {_UNDEFINED}", "-O1 -fsanitize=address"),
    "tsan": ("-O1 -fno-omit-frame-pointer -fsanitize=thread", "-O2 -DCUSIM_TSAN"),
}
_BINDINGS = "-O0"  # and other .cpp
_LINK = {"plain": "", "asan": "-fsanitize=address,undefined", "tsan": "-fsanitize=thread"}
# Kernels look at the same bytes as numbers of several types.
_COMMON = "-std=c++17 -g1 -fPIC -fvisibility=hidden -fno-strict-aliasing -Wall -Wno-unknown-pragmas -DFLAMINGO_EMULATED"


def install(variant: str = "plain") -> ModuleType:
    """Put the emulated module into sys.modules, before anything asks for the real one; returns it.

    Its attribute `emulator` is an `Emulator`: the seed and the order of the threads, and what was counted.
    """
    path = build_module(variant)
    spec = importlib.util.spec_from_file_location(MODULE, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.emulator = Emulator(path)
    sys.modules[MODULE] = module
    return module


def build_module(variant: str = "plain") -> Path:
    """The library of csrc/bindings_cuda.cpp and csrc/cuda."""
    sources = [ROOT / "csrc" / "bindings_cuda.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.c*"))]
    torch_headers = Path(torch.__file__).parent / "include"  # which hold pybind11's
    includes = [torch_headers, Path(sysconfig.get_path("include"))]
    return build(
        f"_cuda-{sys.implementation.cache_tag}", [s for s in sources if s.suffix != ".cuh"], variant, includes=includes
    )


def build(
    name: str, sources: Sequence[Path], variant: str, *, includes: Sequence[Path] = (), program: bool = False
) -> Path:
    """A library, or a program, of sources and the emulator.

    Raises:
        RuntimeError: it cannot be built here, with the reason; or a source does not compile, with the compiler's words.
    """
    if reason := missing():
        raise RuntimeError(f"the emulator cannot be built here: {reason}")
    directory = ROOT / "build" / "cusim" / variant
    directory.mkdir(parents=True, exist_ok=True)
    target = name if program else f"{name}.so"
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (directory / f"{name}.ninja").write_text(_ninja(name, sources, variant, includes, target, program))
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        command = [_ninja_program(), "-C", str(directory), "-f", f"{name}.ninja", *jobs]
        # a sanitizer of this process is not for compilers
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{target} ({variant}) does not compile:\n{done.stdout}{done.stderr}")
    return directory / target


def _ninja(
    name: str, sources: Sequence[Path], variant: str, includes: Sequence[Path], target: str, program: bool
) -> str:
    of_sources, of_runtime = VARIANTS[variant]
    headers = " ".join(f"-isystem {shlex.quote(str(path))}" for path in includes)
    lines = [
        f"cxx = {_compiler()}",
        f"flags = {_COMMON} -I{ROOT / 'csrc'} -I{HERE} -isystem {cuda_headers()}",
        "rule compile",
        "  command = $cxx $flags $more -MD -MF $out.d -x c++ -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "rule link",
        f"  command = $cxx $in {'' if program else '-shared'} {_LINK[variant]} -o $out",
    ]
    flags = {source: f"{of_sources if source.suffix == '.cu' else _BINDINGS} {headers}" for source in sources}
    objects = []
    for group, of in ((name, flags), ("cusim", dict.fromkeys(RUNTIME, of_runtime))):
        for source, more in of.items():
            objects.append(f"{group}.{source.name}.o")
            lines += [f"build {objects[-1]}: compile {source}", f"  more = {more}"]
    return "\n".join([*lines, f"build {target}: link {' '.join(objects)}", ""])


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _ninja_program() -> str:
    import ninja

    return os.path.join(ninja.BIN_DIR, "ninja")


@functools.cache
def cuda_headers() -> Path | None:
    """CUDA's include directory, or None: $CUDA_HOME's, that beside nvcc, or that in /usr/local/cuda."""
    homes = [os.environ["CUDA_HOME"]] if "CUDA_HOME" in os.environ else []
    if nvcc := shutil.which("nvcc"):
        homes.append(Path(nvcc).resolve().parents[1])
    for home in (*homes, "/usr/local/cuda"):
        if (Path(home) / "include" / "cuda_bf16.h").exists():
            return Path(home) / "include"
    return None


def missing() -> str | None:
    """Why nothing can be built for the emulator here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"it runs on Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    if cuda_headers() is None:
        return "no CUDA headers (cuda_bf16.h) in $CUDA_HOME, beside nvcc or in /usr/local/cuda"
    if shutil.which(shlex.split(_compiler())[0]) is None:
        return f"no C++ compiler {_compiler()!r}"
    return None if importlib.util.find_spec("ninja") else "the Python package ninja is not installed"


def runtime_of(variant: str) -> dict[str, str]:
    """The environment in which a Python without sanitizers loads a sanitized module."""
    if variant == "plain":
        return {}
    # the C++ library comes along, whose throw is intercepted
    libraries = (f"lib{variant}.so", "libstdc++.so")
    command = [*shlex.split(_compiler()), "-print-file-name="]
    found = (subprocess.run([*command[:-1], command[-1] + name], capture_output=True, text=True) for name in libraries)
    return {
        "LD_PRELOAD": " ".join(done.stdout.strip() for done in found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep memory until the process ends
        "UBSAN_OPTIONS": "halt_on_error=1 print_stacktrace=1",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1",
    }
