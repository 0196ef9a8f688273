"""Peak and saved memory, where they are known."""

import pytest
import torch
from torch import Tensor

import flamingo_kernels as fk
from benchmarks.memory import peak_bytes, saved_bytes

CPU = torch.device("cpu")
MIB = 2**20


def test_peak_is_the_most_held_at_once() -> None:
    def call() -> Tensor:
        first = torch.empty(3 * MIB, dtype=torch.uint8)
        del first
        second, third = (torch.empty(2 * MIB, dtype=torch.uint8) for _ in range(2))
        del second
        return third

    assert peak_bytes(call, CPU) == 4 * MIB


def test_peak_sees_temporaries_inside_an_op_and_not_what_was_there() -> None:
    x = torch.zeros(MIB, dtype=torch.float32)
    assert peak_bytes(lambda: x.logsumexp(0), CPU) >= 4 * MIB
    assert peak_bytes(lambda: x.add_(1), CPU) < 1024


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_each_storage_is_saved_once_and_inputs_are_counted_apart(device: str) -> None:
    x, y = (torch.ones(MIB, requires_grad=True, device=device) for _ in range(2))
    assert saved_bytes(lambda x, y: x * y, (x, y)) == (0, 8 * MIB)
    assert saved_bytes(lambda x, y: (x.exp() * y).view(2, -1).exp(), (x, y)) == (8 * MIB, 4 * MIB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_cross_attention_saves_what_its_docstring_says(backend, dtype: torch.dtype) -> None:
    rows, tokens, keys, heads, dim = 2, 5, 8, 4, 16
    q = torch.randn(rows, tokens, heads, dim).to(backend.device, dtype).requires_grad_()
    k, v = (torch.randn(rows, keys, heads, dim).to(backend.device, dtype).requires_grad_() for _ in range(2))
    ends = (torch.full((rows, tokens), n, dtype=torch.int32, device=backend.device) for n in (0, keys))
    intervals = fk.Intervals(*ends)
    besides, of_inputs = saved_bytes(lambda *qkv: fk.masked_cross_attention(*qkv, intervals), (q, k, v))
    assert of_inputs == dtype.itemsize * (q.numel() + k.numel() + v.numel())
    assert besides == dtype.itemsize * q.numel() + 4 * rows * heads * tokens + 2 * 4 * rows * tokens
