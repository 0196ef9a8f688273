"""Builds the C++ and CUDA extensions with ninja where that can be done, and installs without them where it cannot.

Torch must be installed first, because the C++ extension is compiled against its headers. FLAMINGO_KERNELS_BUILD says
what to build: auto (C++, and CUDA where torch is a CUDA build and nvcc is found), cpu, cuda (both, whatever torch is)
or none. CXX, CXXFLAGS, CUDA_HOME and torch's own MAX_JOBS and TORCH_CUDA_ARCH_LIST are honoured. What came of it is
written to flamingo_kernels/_build.json, where flamingo_kernels/_backends.py finds it.
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
MODULE = "flamingo_kernels._cpu"
CUDA_MODULE = "flamingo_kernels._cuda"
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
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
    """An extension cannot be built here; the message says why."""


class NotWanted(CannotBuild):
    """Nor was it asked for: nothing to warn of."""


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


def run_ninja(directory: Path, compilers: str) -> None:
    """Build what the directory's build.ninja says. The directory is kept, so that a second build is quick."""
    try:
        from ninja import BIN_DIR
    except ImportError as error:
        raise CannotBuild("the build requirement ninja is not installed") from error
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
        raise CannotBuild(f"{compilers} failed: {errors[0] if errors else 'pip install -v shows its output'}")


def build_library(cxx: list[str], directory: Path) -> Path:
    """Compile the C++ extension and return where it lies."""
    directory.mkdir(parents=True, exist_ok=True)
    library = f"{MODULE}.so"
    write_ninja(directory / "build.ninja", cxx, library)
    run_ninja(directory, shlex.join(cxx))
    return directory / library


# ---- the CUDA extension ---------------------------------------------------------------------------------------------


def cuda_sources() -> list[Path]:
    """Launchers, which nvcc compiles, and bindings. The long ones come first, so that none is left over for the end."""
    launchers = sorted(ROOT.glob("csrc/cuda/*.cu"), key=lambda path: ("attention" not in path.name, path.name))
    return [*launchers, ROOT / "csrc/bindings_cuda.cpp", *sorted(ROOT.glob("csrc/cuda/*.cpp"))]


def find_nvcc() -> str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    candidates = [*(os.path.join(home, "bin", "nvcc") for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next(filter(None, map(shutil.which, candidates)), None)
    if found is None:
        raise CannotBuild("no CUDA compiler: nvcc is not found (set CUDA_HOME)")
    return found


def cuda_architectures(known: set[str]) -> list[str]:
    """nvcc's arguments for the chips in TORCH_CUDA_ARCH_LIST; by default all that the kernels are for and nvcc knows.

    known: the architectures that nvcc compiles for, as "80". Those before sm_80 are left out: the kernels need it.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    arguments = []
    for entry in re.findall(r"[^\s;,]+", asked or CUDA_ARCHITECTURES):
        form = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry)
        if form is None or (asked and f"{form[1]}{form[2]}" not in known):
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST has {entry!r}, which this nvcc does not know")
        number = form[1] + form[2]
        if int(number) >= 80 and number in known:
            arguments.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if form[3]:
                arguments.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not arguments:
        raise CannotBuild("no architecture from sm_80 on is in TORCH_CUDA_ARCH_LIST and known to this nvcc")
    return arguments


def known_architectures(nvcc: str) -> set[str]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return {name.removeprefix("compute_") for name in listed}


def write_cuda_ninja(path: Path, cxx: list[str], nvcc: str, architectures: list[str], library: str) -> None:
    """A build.ninja for the CUDA extension, which holds CUDA's runtime and links no libtorch."""
    import torch

    pybind11 = Path(torch.__file__).parent / "include"
    includes = [pybind11, sysconfig.get_path("include")]
    common = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}"]
    host = [f"-ccbin={cxx[-1]}"] if "CXX" in os.environ else []
    nvcc_flags = [*common, *architectures, *host, "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all"]
    cxx_flags = [*common, "-fPIC", "-fvisibility=hidden", "-Wall", *(f"-isystem{include}" for include in includes)]
    cxx_flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    # Torch has a runtime of its own in the process: this one's names stay inside.
    link_flags = ["-shared", "-cudart=static", "-Xlinker=--exclude-libs=ALL", *host]
    lines = [
        f"cxx = {_command(cxx)}",
        f"nvcc = {_command([nvcc])}",
        f"cxx_flags = {_command(cxx_flags)}",
        f"nvcc_flags = {_command(nvcc_flags)}",
        f"link_flags = {_command(link_flags)}",
        "",
        "rule cxx",
        "  command = $cxx $cxx_flags -MD -MF $out.d -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "rule nvcc",
        "  command = $nvcc $nvcc_flags -MD -MF $out.d -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "rule link",
        "  command = $nvcc $in -o $out $link_flags",
        "",
    ]
    objects = [f"{source.name}.o" for source in cuda_sources()]
    for source, target in zip(cuda_sources(), objects, strict=True):
        lines.append(f"build {target}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {_path(source)}")
    lines += [f"build {library}: link {' '.join(objects)}", ""]
    path.write_text("\n".join(lines))


def build_cuda_library(cxx: list[str], directory: Path) -> tuple[Path, str]:
    """Compile the CUDA extension; where it lies, and what compiled it."""
    import torch

    if requested == "auto" and torch.version.cuda is None:
        raise NotWanted("torch is not a CUDA build (FLAMINGO_KERNELS_BUILD=cuda builds for CUDA all the same)")
    nvcc = find_nvcc()
    directory.mkdir(parents=True, exist_ok=True)
    library = f"{CUDA_MODULE}.so"
    architectures = cuda_architectures(known_architectures(nvcc))
    write_cuda_ninja(directory / "build.ninja", cxx, nvcc, architectures, library)
    run_ninja(directory, f"nvcc or {shlex.join(cxx)}")
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.strip().splitlines()[-2]
    chips = re.findall(r",code=(\w+)", " ".join(architectures))
    return directory / library, f"{release}, {' '.join(chips)}"


# ---- setuptools -----------------------------------------------------------------------------------------------------


class BuildWithNinja(build_ext):
    """Builds the extensions into the wheel, or in place for an editable install, and records what came of it there."""

    def run(self) -> None:
        require_torch()
        record = {"requested": requested}
        build = ROOT / "build"

        def build_cpu() -> Path:
            import torch

            record["torch"] = torch.__version__
            library = build_library(compiler(), build / f"{sys.implementation.cache_tag}-torch-{torch.__version__}")
            record["compiler"] = version(compiler())
            return library

        def build_cuda() -> Path:
            if requested == "cpu":
                raise NotWanted("FLAMINGO_KERNELS_BUILD=cpu")
            library, record["cuda_compiler"] = build_cuda_library(
                compiler(), build / f"{sys.implementation.cache_tag}-cuda"
            )
            return library

        target = self._install(MODULE, build_cpu, record, "error", "plain PyTorch")
        self._install(CUDA_MODULE, build_cuda, record, "cuda_error", "no CUDA C++ kernels")
        target.with_name("_build.json").write_text(json.dumps(record, indent=2) + "\n")

    def _install(self, module: str, build: Callable[[], Path], record: dict, error: str, instead: str) -> Path:
        """Put what `build` builds in the module's place, or a reason into the record: the package works without it."""
        target = Path(self.get_ext_fullpath(module))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # an earlier build's; without it a failure would leave that one in the wheel
        try:
            if requested == "none":
                raise NotWanted("FLAMINGO_KERNELS_BUILD=none")
            shutil.copyfile(build(), target)
        except NotWanted as reason:
            record[error] = str(reason)
        except Exception as failure:  # whatever it is, the package works without
            known = isinstance(failure, CannotBuild)
            record[error] = str(failure) if known else f"{type(failure).__name__}: {failure}"
            print(f"WARNING: flamingo_kernels runs on {instead}: {record[error]}", file=sys.stderr)
        return target


class RequireTorch(dist_info):
    """The first step of every install: the place to stop before anything is downloaded or compiled."""

    def run(self) -> None:
        require_torch()
        super().run()


setup(
    ext_modules=[
        Extension(module, [str(source.relative_to(ROOT)) for source in files])
        for module, files in ((MODULE, sources()), (CUDA_MODULE, cuda_sources()))
    ],
    cmdclass={"build_ext": BuildWithNinja, "dist_info": RequireTorch},
)
