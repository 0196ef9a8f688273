"""What every test may ask for: a backend to run on, with uninitialised memory poisoned.

A process tests one kind of machine. Normally the reference and the C++ kernels on the CPU and, where there is a GPU,
the same cases on it (marker gpu). With TRITON_INTERPRET=1, the Triton kernels on CPU tensors; with the plugin
tests.cusim.plugin, the emulated CUDA kernels.
"""

from collections.abc import Iterator

import pytest
import torch

import flamingo_kernels as fk
from flamingo_kernels import _backends as choice
from tests.support.process import EMULATED, INTERPRETED, Backend, require

if INTERPRETED:
    from tests.triton import interpreter

    interpreter.mend()


def _backends() -> list:
    if INTERPRETED:
        return [Backend("triton", "cpu")]
    if EMULATED:
        return [Backend("cuda", "cpu")]
    on_cpu = [Backend("reference", "cpu"), Backend("cpu", "cpu")]
    if not torch.cuda.is_available():
        return on_cpu
    on_gpu = [Backend(name, "cuda") for name in ("reference", "triton", "cuda") if fk.backends()[name] == "available"]
    return on_cpu + [pytest.param(backend, marks=pytest.mark.gpu) for backend in on_gpu]


@pytest.fixture(params=_backends(), ids=lambda backend: f"{backend.name}-{backend.device}")
def backend(request: pytest.FixtureRequest, poison: None) -> Iterator[Backend]:
    require(request.param.name)
    with fk.use_backend(request.param.name):
        yield request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect cases of a backend that lacks an op that the mark `ops` names, such long heads, or fp64; pytest counts
    them.
    """
    config.hook.pytest_deselected(items=[item for item in items if _is_beyond_the_backend(item)])
    items[:] = [item for item in items if not _is_beyond_the_backend(item)]


def _is_beyond_the_backend(item: pytest.Item) -> bool:
    backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    if not isinstance(backend, Backend) or fk.backends()[backend.name] != "available":
        return False
    if getattr(item.callspec.params.get("case"), "D", 0) > choice._most_head_dim(
        backend.name, "masked_cross_attention"
    ):
        return True
    if backend.name in ("triton", "cuda") and _is_in_fp64(item):
        return True
    return not all(choice._has(backend.name, op) for mark in item.iter_markers("ops") for op in mark.args)


def _is_in_fp64(item: pytest.Item) -> bool:
    values = item.callspec.params.values()
    dtypes = {
        getattr(value, "dtype", value) for value in values if isinstance(getattr(value, "dtype", value), torch.dtype)
    }
    return torch.float64 in dtypes or item.get_closest_marker("fp64") is not None


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill every new uninitialised tensor with NaN, in Python and in C++, so that an element left unwritten shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # only under it does the filling happen
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic)
