"""Any Triton kernel may be launched on CPU tensors, with Triton's own specialisation, and its mistakes have names."""

import re

import pytest
import torch

from tests.support.process import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("a kernel defined under TRITON_INTERPRET=1 cannot be compiled", allow_module_level=True)

import triton
import triton.language as tl

from tests.ptx import PtxError
from tests.ptx.triton_device import executed_on


@triton.jit
def _scale(x, y, n, stride, factor, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = i < n if MASKED else i >= 0
    tl.store(y + i, tl.load(x + i * stride, mask=keep) * factor, mask=keep)


def _scaled(x: torch.Tensor, n: int, masked: bool = True) -> tuple[torch.Tensor, str]:
    y = torch.full((n,), float("nan"), dtype=x.dtype)
    with executed_on(90, seed=0) as ran:
        _scale[(triton.cdiv(n, 128),)](x, y, n, x.stride(0), 0.5, BLOCK=128, MASKED=masked, num_warps=2)
    return y, ran["_scale"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "stride"), [(512, 1), (300, 3)])
def test_results(n, stride, dtype):
    x = torch.randn(n * stride).to(dtype)[::stride]
    y, _ = _scaled(x, n)
    assert torch.equal(y, (x.float() * 0.5).to(dtype))


def test_launches_are_specialised():
    """A stride of 1 is no parameter, and pointers and lengths that 16 divides make vectors of loads."""

    def parameters(ptx: str) -> int:
        return len(re.findall(r"^\s*\.param", ptx, re.M))

    aligned, shifted = (_scaled(x, 512)[1] for x in (torch.randn(512), torch.randn(513)[1:]))
    assert "ld.global.v2.b32" in aligned
    assert "ld.global.v2.b32" not in shifted
    assert parameters(_scaled(torch.randn(1024)[::2], 512)[1]) == parameters(aligned) + 1


def test_an_access_outside_names_the_argument_and_the_line():
    line = _scale.fn.__code__.co_firstlineno + 4
    with pytest.raises(PtxError, match=rf"source line {line}: 8 bytes at byte 1\d+ of x, which has 1200 bytes"):
        _scaled(torch.randn(300), 300, masked=False)


def test_the_driver_is_put_back():
    before = triton.runtime.driver._active
    _scaled(torch.randn(16), 16)
    assert triton.runtime.driver._active is before
