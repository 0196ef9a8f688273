"""Which kernels run: `reference` (plain PyTorch), `cpu` (C++), `triton`, `cuda` (CUDA C++).

A backend is a folder of kernels; here is the only place that knows which ones can run and which one is meant.
"""

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
_BY_DEVICE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
_AVAILABLE = "available"

_chosen: str | None = None  # by use_backend or FLAMINGO_KERNELS_BACKEND; None: by device


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside on one backend: "reference", "cpu", "triton" or "cuda"; process-wide, like torch.backends.

    The backward of an op runs on the backend of its forward. FLAMINGO_KERNELS_BACKEND=name does the same for a process.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend cannot run here; the message says why.
    """
    global _chosen
    _require(name)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def backends() -> dict[str, str]:
    """Each backend's name with "available" or the reason why it is not."""
    return {name: _state(name) for name in BACKENDS}


def select(device_type: str, op: str, head_dim: int = 0) -> str:
    """The backend of an op for tensors of a device: the one asked for, else the first that can run and has the op.

    head_dim: of the heads of an attention, which a backend may have for so many dimensions only.

    Raises:
        NotImplementedError: the backend asked for does not have the op, or not with this head dim.
    """
    if _chosen is None:
        for name in _candidates(device_type):
            if _has(name, op):
                if head_dim <= _most_head_dim(name, op):  # which none of the reference's exceeds
                    return name
                _tell_passed_over(name, op)
    if not _has(_chosen, op):
        raise NotImplementedError(f"{op}: backend {_chosen!r}, which was asked for, does not have this op")
    if head_dim > _most_head_dim(_chosen, op):
        raise NotImplementedError(
            f"{op}: backend {_chosen!r}, which was asked for, takes a head dim of at most "
            f"{_most_head_dim(_chosen, op)}, got {head_dim}"
        )
    return _chosen


@functools.cache  # import_module takes longer to find what is imported than many an op to check its arguments
def kernels(backend: str, op: str) -> ModuleType:
    """The `forward` and `backward` of an op on a backend."""
    if backend == "cpu":
        return getattr(_extension(), op)
    return importlib.import_module(f"flamingo_kernels.{backend}.{op}")


def _require(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
    state = _state(name)
    if state != _AVAILABLE:
        raise RuntimeError(f"use_backend: backend {name!r} cannot run here: {state}")


@torch.compiler.assume_constant_result  # torch.compile must not trace into the search
def _candidates(device_type: str) -> tuple[str, ...]:
    return _usable(device_type)


@torch.compiler.assume_constant_result
def _most_head_dim(backend: str, op: str) -> int:
    return _find_most_head_dim(backend, op)


@functools.cache
def _find_most_head_dim(backend: str, op: str) -> int:
    """What the kernels' module says, if it says anything; the reference has no limit."""
    return sys.maxsize if backend == "reference" else getattr(kernels(backend, op), "MAX_HEAD_DIM", sys.maxsize)


@torch.compiler.assume_constant_result
def _tell_passed_over(backend: str, op: str) -> None:
    _warn_passed_over(backend, op)


@functools.cache
def _warn_passed_over(backend: str, op: str) -> None:
    warnings.warn(
        f"flamingo_kernels: {op} is passed on to another backend, because {backend} takes head dims of at most "
        f"{_most_head_dim(backend, op)}",
        RuntimeWarning,
        stacklevel=4,
    )


@torch.compiler.assume_constant_result
def _has(backend: str, op: str) -> bool:
    return _find(backend, op)


@functools.cache
def _find(backend: str, op: str) -> bool:
    if backend == "cpu":
        return hasattr(_extension(), op)
    return importlib.util.find_spec(f"flamingo_kernels.{backend}.{op}") is not None


@functools.cache
def _usable(device_type: str) -> tuple[str, ...]:
    """The backends that can run on a device, best first; a warning says so where the best cannot."""
    candidates = _BY_DEVICE.get(device_type, ("reference",))
    usable = tuple(name for name in candidates if _state(name) == _AVAILABLE)
    if usable[0] != candidates[0] and _build_record().get("requested") != "none":
        warnings.warn(
            f"flamingo_kernels: {device_type} tensors run on the {usable[0]} backend, because {candidates[0]} is not "
            f"available: {_state(candidates[0])}",
            RuntimeWarning,
            stacklevel=2,
        )
    return usable


@functools.cache
def _state(name: str) -> str:
    if name == "reference":
        return _AVAILABLE
    if name == "cpu":
        try:
            _extension()
        except ImportError as error:
            return str(error)
        return _AVAILABLE
    if name == "triton":
        return _triton_state()
    return _cuda_state()


def _triton_state() -> str:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        return _AVAILABLE
    return "no GPU (TRITON_INTERPRET=1 runs it on the CPU, slowly)"


def _cuda_state() -> str:
    error = _build_record().get("cuda_error")
    try:
        module = importlib.import_module("flamingo_kernels.cuda._module").module()
    except ImportError as missing:
        return f"the CUDA module was not built: {error}" if error else f"the CUDA module cannot be loaded ({missing})"
    return _AVAILABLE if module.emulated or torch.cuda.is_available() else "no GPU"


@functools.cache
def _extension() -> ModuleType:
    """The compiled CPU extension; ImportError with the reason where there is none."""
    record = _build_record()
    if record.get("error"):
        raise ImportError(f"the C++ extension was not built: {record['error']}")
    built_with = record.get("torch")
    if built_with and built_with != torch.__version__:
        raise ImportError(
            f"the C++ extension was built with torch {built_with}, but torch is {torch.__version__}: reinstall "
            "flamingo-kernels"
        )
    try:
        return importlib.import_module("flamingo_kernels._cpu")
    except ImportError as error:
        raise ImportError(f"the C++ extension cannot be loaded: {error}") from error


@functools.cache
def _build_record() -> dict[str, str]:
    """What setup.py wrote about the build: {requested, torch, error, cuda_error}."""
    path = pathlib.Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


if "FLAMINGO_KERNELS_BACKEND" in os.environ:
    _require(os.environ["FLAMINGO_KERNELS_BACKEND"])
    _chosen = os.environ["FLAMINGO_KERNELS_BACKEND"]
