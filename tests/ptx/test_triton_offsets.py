"""Offsets past 2³¹ elements in the compiled attention: tokens and keys far apart, of which few pages are touched."""

import pytest
import torch

from tests.support.process import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("a kernel defined under TRITON_INTERPRET=1 cannot be compiled", allow_module_level=True)

from tests.ptx import PtxError
from tests.ptx.triton_device import executed_on
from tests.support.attention_cases import Case, run_op
from tests.support.dense_attention import Inputs, assert_right

pytestmark = pytest.mark.slow
_APART, _STEPS = 2**29, 5


def _far_apart(name: str) -> Inputs:
    """Inputs of which one has its tokens, or keys, 2²⁹ elements apart."""
    inputs = Case(torch.bfloat16, "full", T=_STEPS, M=1, L=_STEPS, D=16).inputs("cpu")
    x = getattr(inputs, name)
    memory = torch.empty((_STEPS - 1) * _APART + 4096, dtype=x.dtype)
    strides = (x.stride(0), _APART, *x.stride()[2:])
    return inputs._replace(**{name: memory.as_strided(x.shape, strides).copy_(x)})


@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
def test_offsets_are_of_64_bits(name):
    inputs = _far_apart(name)
    with executed_on(80):
        assert_right(run_op(inputs), inputs)


def _to_32_bits(ptx: str) -> str:
    """Every 64-bit product cut to its lower half and extended again."""
    lines = []
    for line in ptx.splitlines():
        lines.append(line)
        if "mul.lo.s64" in line:
            target = line.split()[1].rstrip(",")
            lines += [f"shl.b64 {target}, {target}, 32;", f"shr.s64 {target}, {target}, 32;"]
    return "\n".join(lines) + "\n"


def test_offsets_of_32_bits_are_noticed():
    with executed_on(80, edit=_to_32_bits), pytest.raises(PtxError, match=r"bytes at byte -\d+ of k, which has"):
        run_op(_far_apart("k"))
