"""gated_mlp_of_halves gives, bit by bit, what gated_mlp gives with the halves joined, and keeps no joined copy."""

import pytest
import torch
from torch import Tensor

import flamingo_kernels as fk
from benchmarks.memory import saved_bytes
from flamingo_kernels.ops._gated_mlp_halves import gated_mlp_of_halves
from tests.support.process import normal_process

N, C, F = 5, 24, 40
NAMES = ("x", "norm_weight", "norm_bias", "w_gate", "w_up", "w_out", "gate")


def _tensors(device: str, dtype: torch.dtype, bias: bool = True) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, N, C), (C,), (C,), (F, C), (F, C), (C, F), (1,)]
    drawn = {
        name: torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for name, shape in zip(NAMES, shapes, strict=True)
    }
    return drawn if bias else drawn | {"norm_bias": None}


def _joined(t: dict[str, Tensor | None], norm: str) -> Tensor:
    w_in = torch.cat([t["w_gate"], t["w_up"]])
    parts = (t["x"], t["norm_weight"], t["norm_bias"], w_in, t["w_out"], t["gate"])
    return fk.gated_mlp(*parts, activation="swiglu", norm=norm, eps=1e-6)


@pytest.mark.ops("gated_mlp")
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("frozen", [(), ("w_gate", "w_up"), ("w_up", "x", "gate"), NAMES])
def test_same_bits(backend, norm, frozen):
    results = []
    for run in (gated_mlp_of_halves, None):
        tensors = _tensors(backend.device, torch.bfloat16, bias=norm == "layer")
        for name in frozen:
            if tensors[name] is not None:
                tensors[name].requires_grad_(False)
        y = run(**tensors, norm=norm, eps=1e-6) if run else _joined(tensors, norm)
        assert y.requires_grad == (set(frozen) != set(NAMES))
        if y.requires_grad:
            y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype))
        results.append([y, *(t.grad for t in tensors.values() if t is not None)])
    for ours, expected in zip(*results, strict=True):
        assert (ours is None) == (expected is None)
        assert ours is None or torch.equal(ours, expected)


@normal_process
def test_under_autocast():
    results = []
    for run in (gated_mlp_of_halves, None):
        tensors = _tensors("cpu", torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = run(**tensors, norm="layer", eps=1e-6) if run else _joined(tensors, "layer")
        y.square().sum().backward()
        results.append([y, *(t.grad for t in tensors.values())])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype == torch.float32
        assert torch.equal(ours, expected)


@normal_process
def test_saved_bytes():
    tensors = _tensors("cpu", torch.float32)
    saved, _ = saved_bytes(lambda *given: gated_mlp_of_halves(*given, norm="layer", eps=1e-6), tuple(tensors.values()))
    assert saved == 4 * 2 * N * 2 * F


@normal_process
def test_errors_are_those_of_gated_mlp():
    tensors = _tensors("cpu", torch.float32)
    with pytest.raises(ValueError, match="gated_mlp: w_out must be of shape"):
        gated_mlp_of_halves(**tensors | {"w_up": tensors["w_up"][:-1]}, norm="layer", eps=1e-6)
    with pytest.raises(TypeError, match="gated_mlp: w_in must be a tensor, got NoneType"):
        gated_mlp_of_halves(**tensors | {"w_gate": None}, norm="layer", eps=1e-6)
