"""Every Triton kernel, compiled for sm_80, sm_90 and sm_120, is right to the error budget when its PTX is executed.

At an aligned shape, whose loads are vectors and whose tiles are full, and at an odd one. The ops run as users call
them.
"""

import functools
from collections.abc import Callable

import pytest
import torch

from tests.support.process import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("a kernel defined under TRITON_INTERPRET=1 cannot be compiled", allow_module_level=True)

from flamingo_kernels.triton._kernels import add_normalize
from tests.ptx.triton_device import executed_on
from tests.support import attention_cases, dense_attention, latent_attention_cases, linear_cases, media_kv_cases
from tests.support.attention_cases import Case
from tests.support.budget import assert_within_budget
from tests.support.latent_attention_cases import LatentCase
from tests.support.media_kv_cases import MediaCase
from tests.triton.resources import kernels

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poison")]
CHIPS = (80, 90, 120)
BF16 = torch.bfloat16


def _attention(case: Case) -> None:
    inputs = case.inputs("cpu")
    dense_attention.assert_right(attention_cases.run_op(inputs), inputs)


def _latent_attention(case: LatentCase) -> None:
    inputs = case.inputs("cpu")
    latent_attention_cases.assert_right(latent_attention_cases.run_op(inputs), inputs)


def _media_kv(case: MediaCase) -> None:
    inputs = case.inputs("cpu")
    media_kv_cases.assert_right(media_kv_cases.run_op(inputs), inputs)


def _sum_and_norm(rows: int, C: int) -> None:
    """Where one half of a block ends and the other begins."""
    generator = torch.Generator().manual_seed(C)
    residual, branch = torch.randn(2, rows, C, generator=generator).to(BF16)
    weight, bias = torch.randn(2, C, generator=generator).to(BF16)
    gate = torch.tensor([0.7])
    y, z, copy = add_normalize(residual, branch, gate, weight, bias, "layer", 1e-5, BF16, copy=True)
    exact = residual.double() + gate.double().tanh() * branch.double()
    assert_within_budget("y", y, exact, [residual + (gate.tanh() * branch).to(BF16)])
    assert torch.equal(copy, y)
    norm = functools.partial(torch.nn.functional.layer_norm, normalized_shape=(C,))
    exact = norm(y.double(), weight=weight.double(), bias=bias.double())
    assert_within_budget("z", z, exact, [norm(y, weight=weight, bias=bias)])


def _linear(op: str, **changes) -> Callable[[], None]:
    return functools.partial(linear_cases.check, linear_cases.Case(op, **changes), "cpu")


RUNS = {
    "aligned": {
        "masked_cross_attention": functools.partial(_attention, Case(BF16, "sliding", T=64, M=4)),
        "latent_attention": functools.partial(_latent_attention, LatentCase(BF16, "none", N=1, S=192, R=64, D=64)),
        "latent_attention, tiles": functools.partial(
            _latent_attention, LatentCase(BF16, "none", N=1, S=64, R=128, latents=64, H=1, G=1, D=64)
        ),
        "media_kv": functools.partial(_media_kv, MediaCase(BF16, rows=(64,), V=64)),
        "norm_linear": _linear("norm_linear", dtype=BF16, rows=(64,), C=64, N=64),
        "norm_linear, wide": _linear("norm_linear", dtype=BF16, rows=(4,), C=8448, N=32),
        "linear_gate_residual": _linear("linear_gate_residual", dtype=BF16, rows=(64,), C=64, N=64),
        "gated_mlp": _linear("gated_mlp", dtype=BF16, rows=(64,), C=64, N=64, activation="swiglu"),
        "sum and norm": functools.partial(_sum_and_norm, 64, 64),
        "sum and norm, wide": functools.partial(_sum_and_norm, 4, 8448),
    },
    "odd": {
        "masked_cross_attention": functools.partial(_attention, Case(BF16, "random", 2, 2, T=37, H=4, D=40, L=15)),
        "latent_attention": functools.partial(_latent_attention, LatentCase(BF16, S=135, R=5, H=4, D=40)),
        "latent_attention, tiles": functools.partial(_latent_attention, LatentCase(BF16, S=67, R=35, H=4, D=40)),
        "media_kv": functools.partial(_media_kv, MediaCase(BF16, rows=(33,), V=35, dims=(5, 8))),
        "norm_linear": _linear("norm_linear", dtype=BF16, rows=(33,), C=35, N=33, norm="rms"),
        "norm_linear, wide": _linear("norm_linear", dtype=BF16, rows=(35,), C=8195, N=33, norm="rms"),
        "linear_gate_residual": _linear("linear_gate_residual", dtype=BF16, rows=(33,), C=35, N=33),
        "gated_mlp": _linear("gated_mlp", dtype=BF16, rows=(33,), C=35, N=33, gate="scalar", activation="gelu"),
        "sum and norm": functools.partial(_sum_and_norm, 33, 35),
        "sum and norm, wide": functools.partial(_sum_and_norm, 35, 8195),
    },
}
OPS = tuple(RUNS["aligned"])


@functools.cache
def _execute(op: str, shape: str, cc: int) -> dict[str, str]:
    """Compare an op's forward and backward with fp64; the PTX of the kernels that ran, by name."""
    with executed_on(cc, seed=cc) as ran:
        RUNS[shape][op]()
    return ran


@pytest.mark.parametrize("cc", CHIPS)
@pytest.mark.parametrize("shape", RUNS)
@pytest.mark.parametrize("op", OPS)
def test_within_the_error_budget(op, shape, cc):
    assert _execute(op, shape, cc)


@pytest.mark.parametrize("cc", CHIPS)
@pytest.mark.parametrize("shape", RUNS)
def test_no_kernel_is_left_out(shape, cc):
    ran = {name for op in OPS for name in _execute(op, shape, cc)}
    assert ran == set(kernels())


def test_matrix_instructions_of_each_chip():
    for cc, instruction in {80: "mma.sync", 90: "wgmma.mma_async", 120: "mma.sync"}.items():
        assert instruction in _execute("masked_cross_attention", "aligned", cc)["masked_cross_attention_fwd_kernel"]


@pytest.mark.parametrize("cc", CHIPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_attention_in_other_dtypes(dtype, cc):
    """In fp32 without tensor cores, and for one token of several beams."""
    with executed_on(cc, seed=1):
        _attention(Case(dtype, "random", B=3, beams=3, T=1, H=2, G=1, D=32))
