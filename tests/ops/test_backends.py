"""use_backend, backends() and FLAMINGO_KERNELS_BACKEND: which kernels run, and what is said when they cannot."""

import os
import subprocess
import sys

import pytest
import torch

import flamingo_kernels as fk
from flamingo_kernels import _backends
from flamingo_kernels.reference import masked_cross_attention as reference
from tests.support.attention_cases import Case
from tests.support.process import normal_process

pytestmark = normal_process


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the reference's functions, as they are called."""
    called = []
    for name in ("forward", "backward"):
        original = getattr(reference, name)

        def spy(*args, name=name, original=original):
            called.append(name)
            return original(*args)

        monkeypatch.setattr(reference, name, spy)
    return called


def _attend(requires_grad: bool = False) -> torch.Tensor:
    inputs = Case(T=3, D=8).inputs("cpu")
    return fk.masked_cross_attention(inputs.q.requires_grad_(requires_grad), *inputs[1:3], (inputs.start, inputs.end))


def test_every_backend_is_available_or_says_why_not():
    states = fk.backends()
    assert list(states) == ["reference", "cpu", "triton", "cuda"]
    assert states["reference"] == "available"
    assert all(isinstance(state, str) and len(state) > 8 for state in states.values())


def test_use_backend_chooses_and_restores(calls):
    before = _backends.select("cpu")
    with fk.use_backend("reference"):
        _attend()
        with fk.use_backend("reference"):
            pass
        assert _backends.select("cpu") == _backends.select("cuda") == "reference"
    assert calls == ["forward"]
    assert _backends.select("cpu") == before


def test_use_backend_restores_after_an_error():
    before = _backends.select("cpu")
    with pytest.raises(KeyError), fk.use_backend("reference"):
        raise KeyError
    assert _backends.select("cpu") == before
    with fk.use_backend("reference"):
        with pytest.raises(ValueError, match="name must be one of"), fk.use_backend("tensorflow"):
            pass
        assert _backends.select("cuda") == "reference"


def test_nested_backends():
    available = [name for name, state in fk.backends().items() if state == "available"]
    for outer in available:
        for inner in available:
            with fk.use_backend(outer):
                with fk.use_backend(inner):
                    assert _backends.select("cpu") == inner
                assert _backends.select("cpu") == outer


def test_as_a_decorator(calls):
    fk.use_backend("reference")(_attend)()
    assert calls == ["forward"]


@pytest.mark.parametrize("name", ["", "CPU", "gpu", None, 3])
def test_unknown_backend(name):
    with (
        pytest.raises(ValueError, match=r"name must be one of reference, cpu, triton, cuda, got "),
        fk.use_backend(name),
    ):
        pass


def test_backend_that_cannot_run_says_why():
    missing = {name: state for name, state in fk.backends().items() if state != "available"}
    if not missing:
        pytest.skip("all backends run here")
    for name, reason in missing.items():
        with pytest.raises(RuntimeError) as error, fk.use_backend(name):
            pass
        assert name in str(error.value)
        assert reason in str(error.value)


def test_backward_runs_on_the_backend_of_its_forward(calls):
    with fk.use_backend("reference"):
        o = _attend(requires_grad=True)
    o.sum().backward()
    assert calls == ["forward", "backward"]

    others = [name for name, state in fk.backends().items() if state == "available" and name != "reference"]
    for name in others[:1]:
        with fk.use_backend(name):
            o = _attend(requires_grad=True)
        with fk.use_backend("reference"):
            o.sum().backward()
    assert calls == ["forward", "backward"]


def _python(code: str, backend: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "FLAMINGO_KERNELS_BACKEND": backend}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_environment_variable():
    code = "from flamingo_kernels import _backends as b; print(b.select('cpu'), b.select('cuda'))"
    assert _python(code, "reference").stdout.split() == ["reference", "reference"]
    process = _python(code, "fastest")
    assert process.returncode != 0
    assert "one of reference, cpu, triton, cuda, got 'fastest'" in process.stderr
