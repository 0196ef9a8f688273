"""Builds the C++ extension with ninja where that can be done, and installs without it where it cannot.

Torch must be installed first, because the extension is compiled against its headers. FLAMINGO_KERNELS_BUILD=auto|cpu|
cuda|none says what to build; CXX, CXXFLAGS and torch's own MAX_JOBS are honoured. What came of it is written to
flamingo_kernels/_build.json, where flamingo_kernels/_backends.py finds it.
"""

import importlib.util
import json
import os
import platform
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
MODULE = "flamingo_kernels._cpu"
CHOICES = ("auto", "cpu", "cuda", "none")
MISSING_TORCH = """
flamingo-kernels is compiled against torch, and the build finds no torch. Type

    pip install torch==2.13.0
    pip install .

or, with uv, which hides the environment's torch from the build:

    uv pip install torch==2.13.0 setuptools ninja
    uv pip install --no-build-isolation .
"""

# Sources named *_kernel.cpp are compiled once per instruction set; which one runs is picked at run time.
ISA_FLAGS = {"DEFAULT": []}
X86_DEFINES = []
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["AVX512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
    # Torch's x86 builds have both, and its DispatchStub.h declares other signatures without them.
    X86_DEFINES = ["-DHAVE_AVX2_CPU_DEFINITION", "-DHAVE_AVX512_CPU_DEFINITION"]

requested = os.environ.get("FLAMINGO_KERNELS_BUILD", "auto")
if requested not in CHOICES:
    raise ValueError(f"FLAMINGO_KERNELS_BUILD must be one of {', '.join(CHOICES)}, got {requested!r}")


class CannotBuild(Exception):
    """The extension cannot be built here; the message says why."""


def require_torch() -> None:
    """Stop with what to type if there is no torch to compile against."""
    # pip builds in an environment of its own around the same interpreter, whose own packages can still be named
    sys.path.extend(site.getsitepackages())
    if sys.prefix == sys.base_prefix:
        sys.path.append(site.getusersitepackages())
    if requested != "none" and importlib.util.find_spec("torch") is None:
        raise SystemExit(MISSING_TORCH)


def sources() -> list[Path]:
    return sorted([ROOT / "csrc/bindings_cpu.cpp", *ROOT.glob("csrc/cpu/*.cpp")])


def compilations() -> list[tuple[Path, str, list[str]]]:
    """(source, object, flags), the baseline ones first.

    Inline functions of the standard library and of ATen are compiled into every object that uses them, and the linker
    keeps the first copy. That must be one that every machine can run, hence the order.
    """
    once = [source for source in sources() if not source.stem.endswith("_kernel")]
    kernels = [source for source in sources() if source.stem.endswith("_kernel")]
    result = [(source, f"{source.stem}.o", []) for source in once]
    for isa, flags in ISA_FLAGS.items():
        defines = [f"-DCPU_CAPABILITY={isa}", f"-DCPU_CAPABILITY_{isa}"]
        result += [(source, f"{source.stem}.{isa}.o", [*flags, *defines]) for source in kernels]
    return result


def write_ninja(path: Path, cxx: list[str], library: str) -> None:
    """A build.ninja that compiles every source and links `library`."""
    import torch
    from torch.utils import cpp_extension

    # -isystem keeps the warnings of headers that are not ours out of the output
    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    compile_flags = [
        # Where a product and a sum are fused into one rounding is for the kernels to say, not for the compiler.
        *("-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi"),
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # false alarms from GCC's own AVX-512 headers
        f"-DTORCH_EXTENSION_NAME={MODULE.rpartition('.')[2]}",
        "-DTORCH_API_INCLUDE_EXTENSION_H",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *X86_DEFINES,
        f"-I{ROOT / 'csrc'}",
        *(f"-isystem{include}" for include in includes),
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ]
    # No rpath: `import torch` comes first and has loaded these libraries by then.
    link_flags = ["-shared", "-fopenmp", *(f"-L{directory}" for directory in cpp_extension.library_paths())]
    link_flags += ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]

    lines = [
        f"cxx = {_command(cxx)}",
        f"compile_flags = {_command(compile_flags)}",
        f"link_flags = {_command(link_flags)}",
        "",
        "rule cxx",
        "  command = $cxx $compile_flags $isa_flags -MD -MF $out.d -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "rule link",
        "  command = $cxx $in -o $out $link_flags",
        "",
    ]
    for source, target, isa_flags in compilations():
        lines += [f"build {target}: cxx {_path(source)}", f"  isa_flags = {_command(isa_flags)}"]
    lines += [f"build {library}: link {' '.join(target for _, target, _ in compilations())}", ""]
    path.write_text("\n".join(lines))


def _command(words: list[str]) -> str:
    return " ".join(shlex.quote(word).replace("$", "$$") for word in words)


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def compiler() -> list[str]:
    """The C++ compiler as words; CXX may hold a launcher too ("ccache g++")."""
    cxx = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(cxx[0]) is None:
        raise CannotBuild(f"no C++ compiler: {cxx[0]!r} is not found (install g++, or set CXX)")
    return cxx


def version(cxx: list[str]) -> str:
    """The first line of what the compiler says about itself."""
    return subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]


def build_library(cxx: list[str], directory: Path) -> Path:
    """Compile the extension and return where it lies. The directory is kept, so that a second build is quick."""
    try:
        from ninja import BIN_DIR
    except ImportError as error:
        raise CannotBuild("the build requirement ninja is not installed") from error
    directory.mkdir(parents=True, exist_ok=True)
    library = f"{MODULE}.so"
    write_ninja(directory / "build.ninja", cxx, library)
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    ninja = [os.path.join(BIN_DIR, "ninja"), "-C", str(directory), *jobs]
    done = subprocess.run(
        ninja,
        env={**os.environ, "LC_ALL": "C"},  # errors in English, to be found below
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
    )
    print(done.stdout, flush=True)
    if done.returncode:
        errors = [line.strip() for line in done.stdout.splitlines() if "error:" in line]
        raise CannotBuild(f"{shlex.join(cxx)} failed: {errors[0] if errors else 'pip install -v shows its output'}")
    return directory / library


class BuildWithNinja(build_ext):
    """Builds the extension into the wheel, or in place for an editable install, and records the outcome beside it."""

    def run(self) -> None:
        require_torch()
        target = Path(self.get_ext_fullpath(MODULE))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # an earlier build's; without it a failure would leave that one in the wheel
        record = {"requested": requested}
        if requested == "none":
            record["error"] = "FLAMINGO_KERNELS_BUILD=none"
        elif requested == "cuda":
            record["error"] = "FLAMINGO_KERNELS_BUILD=cuda asks for CUDA C++ alone, and this version has none"
        else:
            try:
                import torch

                cxx = compiler()
                record["torch"] = torch.__version__
                directory = ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
                shutil.copyfile(build_library(cxx, directory), target)
                record["compiler"] = version(cxx)
            except Exception as error:  # whatever it is, plain PyTorch still works
                record["error"] = str(error) if isinstance(error, CannotBuild) else f"{type(error).__name__}: {error}"
        if "error" in record and requested != "none":
            print(f"WARNING: flamingo_kernels runs on plain PyTorch: {record['error']}", file=sys.stderr)
        target.with_name("_build.json").write_text(json.dumps(record, indent=2) + "\n")


class RequireTorch(dist_info):
    """The first step of every install: the place to stop before anything is downloaded or compiled."""

    def run(self) -> None:
        require_torch()
        super().run()


setup(
    ext_modules=[Extension(MODULE, [str(source.relative_to(ROOT)) for source in sources()])],
    cmdclass={"build_ext": BuildWithNinja, "dist_info": RequireTorch},
)
