"""What every test may ask for: a backend to run on, with uninitialised memory poisoned.

A process tests one kind of machine. Normally the reference and the C++ kernels on the CPU and, where there is a GPU,
the same cases on it (marker gpu). With TRITON_INTERPRET=1, the Triton kernels on CPU tensors.
"""

from collections.abc import Iterator

import pytest
import torch

import flamingo_kernels as fk
from tests.support.process import INTERPRETED, Backend, require

if INTERPRETED:
    from tests.triton import interpreter

    interpreter.mend()


def _backends() -> list:
    if INTERPRETED:
        return [Backend("triton", "cpu")]
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
