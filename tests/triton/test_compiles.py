"""Every Triton kernel compiles for every chip from sm_80 to sm_120: no spills, shared memory to spare, tensor cores."""

import pytest
import torch

from tests.support.process import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("a kernel defined under TRITON_INTERPRET=1 cannot be compiled", allow_module_level=True)

from flamingo_kernels.triton import _attention, latent_attention, masked_cross_attention
from tests.triton.ahead_of_time import SHARED_MEMORY, compile_for

pytestmark = pytest.mark.slow
KERNELS = {
    masked_cross_attention.masked_cross_attention_fwd_kernel: masked_cross_attention._FORWARD,
    masked_cross_attention.masked_cross_attention_bwd_kernel: masked_cross_attention._BACKWARD,
    latent_attention.latent_attention_fwd_kernel: latent_attention._FORWARD,
    latent_attention.latent_attention_bwd_kernel: latent_attention._BACKWARD,
}
SMALL = {  # without products of matrices
    masked_cross_attention.masked_cross_attention_bwd_prepare_kernel: masked_cross_attention._BACKWARD,
    latent_attention.latent_attention_merge_kernel: latent_attention._FORWARD,
}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
INPUTS = {"do", "q", "k", "v", "o", "dq", "dk", "dv", "out"} | {
    f"{name}_{of}" for name in ("k", "v", "dk", "dv") for of in ("media", "latents")
}
POINTERS = dict.fromkeys(("start", "end", "runs", "media_lengths"), "*i32")
POINTERS |= dict.fromkeys(("lse", "delta", "parts", "part_lse"), "*fp32")
SIZES = {"of_keys", "T", "K", "G", "ROWS", "N", "R", "S", "LATENTS", "H", "rows"}


def _compile(kernel, cc: int, dtype: torch.dtype, D: int, R: int, precision: str, rows: int = 1000):
    """As the host functions launch it, with strides that are multiples of 16 elements."""
    table = {**KERNELS, **SMALL}[kernel]
    tile = _attention.tile_of(table, torch.empty(1, 1, 1, D, dtype=dtype), rows)
    group = "GROUP" if kernel.__name__.startswith("latent") else "R"
    constexprs = {**tile, **masked_cross_attention._RUNS, group: R, "D": D, "SPLITS": 4, "PRECISION": precision}
    if kernel is latent_attention.latent_attention_merge_kernel:
        constexprs |= {"BM": latent_attention._MERGED // tile["BD"], "num_warps": 2}
    options = {name: constexprs.pop(name) for name in ("num_warps", "num_stages")}
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(INPUTS, TYPES[dtype]) | POINTERS
    types |= {"softmax_scale": "fp32"} | {name: ("constexpr", value) for name, value in constexprs.items()}
    arguments = {name: types[name] for name in kernel.arg_names}
    aligned = set(kernel.arg_names) - set(constexprs) - SIZES - {"softmax_scale"}
    return compile_for(kernel, arguments, aligned, cc, options)


def _assert_fits(compiled, cc: int) -> None:
    assert compiled.shared <= SHARED_MEMORY[cc] * 1024, compiled
    assert compiled.stack == compiled.spills == 0, compiled


@pytest.mark.parametrize("cc", SHARED_MEMORY)
@pytest.mark.parametrize(("dtype", "D"), [(d, D) for d in (torch.bfloat16, torch.float32) for D in (64, 128)], ids=str)
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


@pytest.mark.parametrize("cc", SHARED_MEMORY)
def test_kernels_without_matrices(cc):
    for kernel in SMALL:
        for dtype in (torch.bfloat16, torch.float32):
            _assert_fits(_compile(kernel, cc, dtype, 128, R=1, precision="ieee"), cc)


def test_no_kernel_is_left_out():
    modules = (masked_cross_attention, latent_attention)
    defined = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert defined == {kernel.__name__ for kernel in (*KERNELS, *SMALL)}
