"""The rules of the build: what is compiled with which flags, which switches there are, what is packed."""

import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import flamingo_kernels as fk
from tests.packaging.conftest import ROOT
from tests.support.process import normal_process

pytestmark = normal_process

CSRC = sorted(path for path in ROOT.glob("csrc/**/*") if path.suffix in (".cpp", ".h"))
CPU_SOURCES = [path for path in CSRC if path.parent.name == "cpu" and path.suffix == ".cpp"]
CROSS_COMPILER = shutil.which("aarch64-linux-gnu-g++")
FOR_AARCH64 = pytest.mark.skipif(CROSS_COMPILER is None, reason="no aarch64-linux-gnu-g++")


def ninja_file(setup: dict, tmp_path: Path) -> str:
    setup["write_ninja"](tmp_path / "build.ninja", ["c++"], "library.so")
    return (tmp_path / "build.ninja").read_text()


def machine_flags(ninja: str) -> dict[str, list[str]]:
    """Each object with the -m flags it is compiled with."""
    lines = re.findall(r"^build (\S+): cxx .*\n  isa_flags =(.*)$", ninja, re.MULTILINE)
    return {target: [flag for flag in flags.split() if flag.startswith("-m")] for target, flags in lines}


def test_only_kernels_are_compiled_for_an_instruction_set(
    setup_script: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    ninja = ninja_file(setup_script(), tmp_path)
    flags = machine_flags(ninja)
    kernels = [path.stem for path in CPU_SOURCES if path.stem.endswith("_kernel")]
    assert kernels
    for kernel in kernels:
        assert flags[f"{kernel}.DEFAULT.o"] == []
        assert "-mavx2" in flags[f"{kernel}.AVX2.o"]
        assert "-mavx512f" in flags[f"{kernel}.AVX512.o"]
    assert {target for target, found in flags.items() if found} == {
        f"{kernel}.{isa}.o" for kernel in kernels for isa in ("AVX2", "AVX512")
    }
    assert "native" not in ninja.partition("\nrule")[0]


def test_objects_of_the_baseline_are_linked_first(
    setup_script: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    ninja = ninja_file(setup_script(), tmp_path)
    flags = machine_flags(ninja)
    linked = re.search(r"^build library.so: link (.*)$", ninja, re.MULTILINE)[1].split()
    assert sorted(linked) == sorted(flags)
    special = [bool(flags[target]) for target in linked]
    assert special == sorted(special)


def test_other_machines_compile_the_baseline_alone(
    setup_script: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    ninja = ninja_file(setup_script(), tmp_path)
    assert not any(machine_flags(ninja).values())
    assert "AVX" not in ninja


def test_cxxflags_come_last(setup_script: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-O1 -DNAME='a b'")
    flags = re.search(r"^compile_flags = (.*)$", ninja_file(setup_script(), tmp_path), re.MULTILINE)[1]
    assert flags.endswith("-O1 '-DNAME=a b'")


def test_an_unknown_switch_names_the_choices(setup_script: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAMINGO_KERNELS_BUILD", "gpu")
    with pytest.raises(ValueError, match=r"FLAMINGO_KERNELS_BUILD must be one of auto, cpu, cuda, none, got 'gpu'"):
        setup_script()


def test_a_missing_compiler_is_named(setup_script: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    setup = setup_script()
    with pytest.raises(setup["CannotBuild"], match="'no-such-compiler' is not found"):
        setup["compiler"]()


def test_the_source_distribution_holds_all_that_is_compiled(source: Path) -> None:
    for path in CSRC:
        assert (source / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    for name in ("setup.py", "LICENSE", "README.md", "Makefile", "flamingo_kernels/py.typed", "flamingo/py.typed"):
        assert (source / name).is_file()
    assert not [*source.rglob("*.so"), *source.rglob("_build.json")]


def test_the_version_is_the_same_everywhere() -> None:
    assert re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1] == fk.__version__
    assert re.search(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == fk.__version__


@pytest.mark.parametrize("path", CSRC, ids=lambda path: path.name)
def test_x86_headers_stay_in_files_of_an_instruction_set(path: Path) -> None:
    if not path.stem.endswith(("_kernel", "_avx2", "_avx512")):
        included = re.findall(r"#\s*include\s*<(\w+)\.h>", path.read_text())
        assert not [name for name in included if re.search(r"mmintrin|immintrin|x86|cpuid", name)]


@FOR_AARCH64
@pytest.mark.slow
@pytest.mark.parametrize("path", CPU_SOURCES, ids=lambda path: path.name)
def test_the_baseline_compiles_for_aarch64(
    path: Path, setup_script: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    setup = setup_script()
    flags = re.search(r"^compile_flags = (.*)$", ninja_file(setup, tmp_path), re.MULTILINE)[1].split()
    (isa_flags,) = [isa_flags for source, _, isa_flags in setup["compilations"]() if source == path]
    done = subprocess.run([CROSS_COMPILER, *flags, *isa_flags, "-fsyntax-only", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- CUDA -----------------------------------------------------------------------------------------------------------

KNOWN = {"75", "80", "86", "89", "90", "100", "120"}


def _architectures(setup: dict, known: set[str] = KNOWN) -> list[str]:
    return re.findall(r",code=(\w+)", " ".join(setup["cuda_architectures"](known)))


def test_cuda_kernels_are_built_for_all_chips(setup_script: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    chips = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
    assert _architectures(setup_script()) == [*chips, "compute_120"]
    assert _architectures(setup_script(), {"80", "86", "90"}) == ["sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("asked", "built"),
    [
        ("9.0", ["sm_90"]),
        ("8.0;8.6+PTX", ["sm_80", "sm_86", "compute_86"]),
        ("7.5 8.0, 9.0a", ["sm_80", "sm_90"]),
    ],
)
def test_the_chips_asked_for(
    setup_script: Callable, monkeypatch: pytest.MonkeyPatch, asked: str, built: list[str]
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert _architectures(setup_script()) == built


@pytest.mark.parametrize(
    ("asked", "message"),
    [("Hopper", "has 'Hopper'"), ("8.0;13.0", "has '13.0'"), ("7.5", "no architecture from sm_80")],
)
def test_chips_that_cannot_be_built_for(
    setup_script: Callable, monkeypatch: pytest.MonkeyPatch, asked: str, message: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    setup = setup_script()
    with pytest.raises(setup["CannotBuild"], match=message):
        setup["cuda_architectures"](KNOWN)


def test_the_cuda_module_holds_its_runtime_and_links_no_torch(setup_script: Callable, tmp_path: Path) -> None:
    setup = setup_script()
    setup["write_cuda_ninja"](tmp_path / "build.ninja", ["c++"], "/opt/cuda/bin/nvcc", ["-gencode=x"], "library.so")
    ninja = (tmp_path / "build.ninja").read_text()
    link = re.search(r"^link_flags = (.*)$", ninja, re.MULTILINE)[1]
    assert "-cudart=static" in link
    assert "torch" not in link
    compiled = re.findall(r"^build \S+: (nvcc|cxx) (\S+)$", ninja, re.MULTILINE)
    assert {Path(source) for _, source in compiled} == set(setup["cuda_sources"]())
    assert all((rule == "nvcc") == source.endswith(".cu") for rule, source in compiled)


def test_cuda_is_not_wanted_by_a_torch_without_it(setup_script: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAMINGO_KERNELS_BUILD", "auto")
    monkeypatch.setattr("torch.version.cuda", None)
    setup = setup_script()
    with pytest.raises(setup["NotWanted"], match="torch is not a CUDA build"):
        setup["build_cuda_library"](["c++"], Path("/nowhere"))


def test_a_missing_nvcc_is_named(setup_script: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_script()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(setup["CannotBuild"], match="nvcc is not found"):
        setup["find_nvcc"]()
