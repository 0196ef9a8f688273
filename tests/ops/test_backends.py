"""use_backend, backends() and FLAMINGO_KERNELS_BACKEND: which kernels run, and what is said when they cannot."""

import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

import flamingo_kernels as fk
from flamingo_kernels import _backends
from flamingo_kernels.reference import masked_cross_attention as reference
from tests.support.attention_cases import Case
from tests.support.process import normal_process, require

pytestmark = normal_process
OP = "masked_cross_attention"


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
    before = _backends.select("cpu", OP)
    with fk.use_backend("reference"):
        _attend()
        with fk.use_backend("reference"):
            pass
        assert _backends.select("cpu", OP) == _backends.select("cuda", OP) == "reference"
    assert calls == ["forward"]
    assert _backends.select("cpu", OP) == before


def test_use_backend_restores_after_an_error():
    before = _backends.select("cpu", OP)
    with pytest.raises(KeyError), fk.use_backend("reference"):
        raise KeyError
    assert _backends.select("cpu", OP) == before
    with fk.use_backend("reference"):
        with pytest.raises(ValueError, match="name must be one of"), fk.use_backend("tensorflow"):
            pass
        assert _backends.select("cuda", OP) == "reference"


def test_nested_backends():
    available = [name for name, state in fk.backends().items() if state == "available"]
    for outer in available:
        for inner in available:
            with fk.use_backend(outer):
                with fk.use_backend(inner):
                    assert _backends.select("cpu", OP) == inner
                assert _backends.select("cpu", OP) == outer


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


# ---- an op that only some backends have ----------------------------------------------------------------------------


@pytest.fixture
def reference_has_more(monkeypatch) -> str:
    """The name of an op that the reference alone has."""
    name = "only_in_the_reference"
    find = _backends._find
    monkeypatch.setattr(
        _backends, "_find", lambda backend, op: backend == "reference" if op == name else find(backend, op)
    )
    return name


def test_a_backend_without_the_op_is_passed_over(reference_has_more):
    assert _backends.select("cpu", reference_has_more) == "reference"
    assert _backends.select("meta", reference_has_more) == "reference"


def test_a_backend_without_the_op_cannot_be_asked_for(reference_has_more):
    for name, state in fk.backends().items():
        if state == "available" and name != "reference":
            message = f"^{reference_has_more}: backend {name!r}, which was asked for, does not have this op$"
            with fk.use_backend(name), pytest.raises(NotImplementedError, match=message):
                _backends.select("cpu", reference_has_more)
    with fk.use_backend("reference"):
        assert _backends.select("cpu", reference_has_more) == "reference"


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_backend_has_the_ops_of_its_folder(backend):
    assert _backends._find(backend, OP)
    assert not _backends._find(backend, "no_such_op")


def test_the_cpu_backend_has_the_ops_of_its_module():
    require("cpu")
    assert _backends._find("cpu", OP)
    assert not _backends._find("cpu", "no_such_op")


@pytest.fixture
def no_triton(monkeypatch) -> None:
    """A GPU without Triton, in a process where nothing has been chosen yet."""
    for function in (_backends._usable, _backends._state):
        monkeypatch.setattr(_backends, function.__name__, function.__wrapped__)
    monkeypatch.setattr(_backends, "_triton_state", lambda: "there is none")


def test_warns_that_the_best_backend_is_missing(no_triton):
    with pytest.warns(RuntimeWarning, match="cuda tensors run on the reference backend.*triton.*there is none"):
        assert _backends.select("cuda", OP) == "reference"


def test_cuda_takes_the_place_of_triton():
    """In a process where Triton cannot be imported and there are CUDA kernels."""
    code = """
        import sys, types, warnings
        sys.modules["triton"] = None
        sys.modules["flamingo_kernels._cuda"] = types.SimpleNamespace(emulated=True)
        import flamingo_kernels as fk
        from flamingo_kernels import _backends
        assert fk.backends()["triton"].startswith("Triton cannot be imported"), fk.backends()
        assert fk.backends()["cuda"] == "available", fk.backends()
        warnings.simplefilter("ignore")
        print(*(_backends.select("cuda", "masked_cross_attention", head_dim) for head_dim in (128, 160)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cuda", "reference"]


def test_a_head_dim_that_a_backend_does_not_have(monkeypatch):
    """Is passed over, and a warning says so once; asked for by name, it is an error."""
    monkeypatch.setattr(_backends, "_usable", lambda device_type: ("cuda", "reference"))
    _backends._warn_passed_over.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"{OP} is passed on.*because cuda takes head dims of at most 128"):
        assert _backends.select("cuda", OP, 160) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backends.select("cuda", OP, 160) == "reference"
        assert _backends.select("cuda", OP, 128) == "cuda"
    monkeypatch.setattr(_backends, "_chosen", "cuda")
    message = f"^{OP}: backend 'cuda', which was asked for, takes a head dim of at most 128, got 160$"
    with pytest.raises(NotImplementedError, match=message):
        _backends.select("cuda", OP, 160)


def test_does_not_warn_of_an_op_that_is_missing(monkeypatch, reference_has_more, recwarn):
    monkeypatch.setattr(_backends, "_usable", _backends._usable.__wrapped__)
    monkeypatch.setattr(_backends, "_state", lambda name: "available")
    assert _backends.select("cuda", reference_has_more) == "reference"
    assert _backends.select("cuda", OP) == "triton"
    assert not recwarn


def test_compiled_code_passes_over_a_backend_without_the_op(monkeypatch, calls):
    torch._dynamo.reset()
    monkeypatch.setattr(_backends, "_find", lambda backend, op: backend == "reference")
    inputs = Case(T=3, D=8).inputs("cpu")

    def attend(q: torch.Tensor) -> torch.Tensor:
        return fk.masked_cross_attention(q, *inputs[1:3], (inputs.start, inputs.end))

    torch.compile(attend, fullgraph=True, backend="eager")(inputs.q)
    assert calls == ["forward"]


# ---- for a process --------------------------------------------------------------------------------------------------


def _python(code: str, backend: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "FLAMINGO_KERNELS_BACKEND": backend}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_environment_variable():
    code = f"from flamingo_kernels import _backends as b; print(b.select('cpu', '{OP}'), b.select('cuda', '{OP}'))"
    assert _python(code, "reference").stdout.split() == ["reference", "reference"]
    process = _python(code, "fastest")
    assert process.returncode != 0
    assert "one of reference, cpu, triton, cuda, got 'fastest'" in process.stderr
