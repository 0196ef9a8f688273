"""Every Triton kernel compiles for every chip from sm_80 to sm_120: no spills, shared memory to spare, tensor cores."""

import pytest
import torch

from tests.support.process import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("a kernel defined under TRITON_INTERPRET=1 cannot be compiled", allow_module_level=True)

from flamingo_kernels.triton import masked_cross_attention
from tests.triton.ahead_of_time import SHARED_MEMORY, compile_for

pytestmark = pytest.mark.slow
KERNELS = {
    masked_cross_attention.masked_cross_attention_fwd_kernel: masked_cross_attention._FORWARD,
    masked_cross_attention.masked_cross_attention_bwd_dq_kernel: masked_cross_attention._BACKWARD,
    masked_cross_attention.masked_cross_attention_bwd_dkdv_kernel: masked_cross_attention._BACKWARD,
}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
POINTERS = {"start": "*i32", "end": "*i32", "hull": "*i32", "lse": "*fp32", "delta": "*fp32", "softmax_scale": "fp32"}
SIZES = {"T", "K", "G", "ROWS"}


def _compile(kernel, cc: int, dtype: torch.dtype, D: int, R: int, precision: str, rows: int = 1000):
    """As the host functions launch it, with strides that are multiples of 16 elements."""
    tile = masked_cross_attention._tile(KERNELS[kernel], torch.empty(1, 1, 1, D, dtype=dtype), rows)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    constexprs = {**tile, "R": R, "D": D, "PRECISION": precision}
    arguments = dict.fromkeys(kernel.arg_names, "i32")
    arguments |= dict.fromkeys({"q", "k", "v", "o", "do", "dq", "dk", "dv"}, TYPES[dtype]) | POINTERS
    arguments |= {name: ("constexpr", value) for name, value in constexprs.items()}
    aligned = set(kernel.arg_names) - set(constexprs) - SIZES - {"softmax_scale"}
    return compile_for(kernel, arguments, aligned, cc, options)


def _assert_fits(compiled, cc: int) -> None:
    assert compiled.shared <= SHARED_MEMORY[cc] * 1024, compiled
    assert compiled.stack == compiled.spills == 0, compiled


@pytest.mark.parametrize("cc", SHARED_MEMORY)
@pytest.mark.parametrize(("dtype", "D"), [(torch.bfloat16, 64), (torch.float32, 128)], ids=str)
def test_tensor_cores_on_every_chip(dtype, D, cc):
    for kernel in KERNELS:
        compiled = _compile(kernel, cc, dtype, D, R=1, precision="tf32")
        _assert_fits(compiled, cc)
        assert compiled.matrix > 0, compiled


@pytest.mark.parametrize(("cc", "D"), [(80, 64), (90, 128)])
def test_fp32_without_tf32(cc, D):
    """In full fp32 there are no tensor cores to use, and the tiles still fit."""
    for kernel in KERNELS:
        compiled = _compile(kernel, cc, torch.float32, D, R=1, precision="ieee")
        _assert_fits(compiled, cc)
        assert compiled.matrix == 0, compiled


@pytest.mark.parametrize(("D", "rows"), [(80, 1000), (64, 4)])
def test_grouped_heads(D, rows):
    """Four query heads per key head, a padded head dim, and the small tiles of decoding."""
    for kernel in KERNELS:
        compiled = _compile(kernel, 89, torch.float16, D, R=4, precision="ieee", rows=rows)
        _assert_fits(compiled, 89)
        assert compiled.matrix > 0, compiled


def test_no_kernel_is_left_out():
    defined = {name for name in vars(masked_cross_attention) if name.endswith("_kernel")}
    assert defined == {kernel.__name__ for kernel in KERNELS}
