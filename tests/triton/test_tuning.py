"""FLAMINGO_KERNELS_AUTOTUNE: off it changes nothing, and on every candidate fits the chip and computes the same.

There is no device to time them on, so a benchmark that runs each once and likes the last best takes its place.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch

from tests.support.process import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("a kernel defined under TRITON_INTERPRET=1 cannot be compiled", allow_module_level=True)

import triton

from flamingo_kernels import _backends
from flamingo_kernels.triton import _tuning
from tests.ptx.triton_device import Device, executed_on
from tests.support import attention_cases, dense_attention, latent_attention_cases
from tests.support.attention_cases import Case
from tests.support.latent_attention_cases import LatentCase
from tests.triton import resources

pytestmark = pytest.mark.slow
TUNED = resources.WITH_DOTS


class _Compiling(Device):
    """Notes every compilation, and launches nothing."""

    def __init__(self, cc: int) -> None:
        super().__init__(cc, None, None)
        self.compiled: list[tuple[str, dict[str, object]]] = []
        self.launcher_cls = self._note

    def get_current_device(self) -> str:
        return f"tuner {id(self)}, sm_{self.cc}"  # its own each time, or nothing would be compiled the second time

    def _note(self, source, metadata) -> Callable:
        kernel = resources._Noting(source, metadata)
        self.compiled.append((kernel.name, kernel.kernel))
        return lambda *launch: None


@pytest.fixture
def autotune(monkeypatch) -> Iterator[None]:
    def benchmark(kernel: Callable, quantiles: object) -> list[float]:
        kernel()
        benchmark.runs += 1
        return [1 / benchmark.runs] * 3

    benchmark.runs = 0
    monkeypatch.setattr(Device, "get_benchmarker", lambda self: benchmark)
    monkeypatch.setattr(_tuning, "_AUTOTUNE", True)
    _tuning._autotuned.cache_clear()
    yield
    _tuning._autotuned.cache_clear()


def _compile(cc: int) -> list[tuple[str, dict[str, object]]]:
    device = _Compiling(cc)
    with mock.patch.object(triton.runtime.driver, "_active", device), mock.patch.object(_backends, "_chosen", "triton"):
        attention_cases.run_op(Case(torch.bfloat16, "sliding", T=64, M=4).inputs("cpu"))
        latent_attention_cases.run_op(LatentCase(torch.bfloat16, "none", N=1, S=192, R=64, D=64).inputs("cpu"))
        several_tiles = LatentCase(torch.bfloat16, "none", N=1, S=192, R=128, D=64)
        latent_attention_cases.run_op(several_tiles.inputs("cpu"))
    return device.compiled


def test_off_each_kernel_is_compiled_once():
    counts = Counter(name for name, _ in _compile(90))
    assert {name: counts[name] for name in TUNED} == dict.fromkeys(TUNED, 1)


def test_on_each_candidate_is_compiled_and_fits(autotune):
    compiled = _compile(90)
    counts = Counter(name for name, _ in compiled)
    assert {name for name in counts if counts[name] >= 3} == TUNED
    assert not [each for each in compiled if each[1]["spills"]]


def test_on_results_are_right(autotune):
    with executed_on(80, seed=0):
        inputs = Case(torch.bfloat16, "random", 1, T=37, H=2, D=40, L=15).inputs("cpu")
        dense_attention.assert_right(attention_cases.run_op(inputs), inputs)
        inputs = LatentCase(torch.bfloat16, N=1, S=70, R=5, H=2, D=40).inputs("cpu")
        latent_attention_cases.assert_right(latent_attention_cases.run_op(inputs), inputs)
