"""The CUDA kernels of latent attention: bytes and bank conflicts by count, tf32, parts of keys and of query rows."""

from dataclasses import replace

import pytest
import torch

import flamingo_kernels as fk
from flamingo_kernels._gpu import splits as shares
from tests.support.latent_attention_cases import LatentCase, assert_right, attend, leaves_of, run_op
from tests.support.process import EMULATED

if not EMULATED:
    pytest.skip("runs on the emulated kernels (pytest -p tests.cusim.plugin)", allow_module_level=True)

from flamingo_kernels.cuda._module import module

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EMULATOR = module().emulator


def _moved() -> int:
    counted = EMULATOR.counters()
    for what in ("ldmatrix", "cp_async", "shared"):
        assert counted[f"{what}_wavefronts"] == counted[f"{what}_least"], what
    return counted["global_bytes_read"] + counted["global_bytes_written"]


@pytest.mark.parametrize(
    "case",
    [
        LatentCase(dtype=BF16, lengths="none", N=1, S=256, R=64, H=1, G=1, D=64),
        LatentCase(dtype=BF16, lengths="full", N=1, S=200, R=64, H=1, G=1, D=96),
        LatentCase(dtype=FP16, lengths="none", N=1, S=100, R=64, H=1, G=1, D=128),
        LatentCase(dtype=FP32, lengths="none", N=1, S=100, R=64, H=1, G=1, D=64),
    ],
    ids=str,
)
def test_bytes_and_bank_conflicts(backend, case, monkeypatch):
    """With media enough for a machine, forward and backward move at most 1.1 times what comes in and goes out."""
    monkeypatch.setattr(shares, "_PROCESSORS", 1)
    inputs = case.inputs("cpu")
    leaves = leaves_of(inputs)
    EMULATOR.reset()
    o, lse = attend(inputs, *leaves, return_lse=True)
    forward = _moved()
    EMULATOR.reset()
    torch.autograd.grad(o, leaves, inputs.do)
    backward = _moved()
    queries, keys = inputs.q.nbytes, sum(x.nbytes for x in inputs[1:5])
    assert forward <= 1.1 * (2 * queries + keys + lse.nbytes)
    assert backward <= 1.1 * (4 * queries + 2 * keys + lse.nbytes)


@pytest.mark.parametrize("processors", [2, 64])
@pytest.mark.parametrize(
    "case",
    [
        LatentCase(dtype=BF16, S=300, R=20, H=2, G=1, D=64),
        LatentCase(dtype=FP32, lengths="some_zero", N=2, S=150, R=70, H=1, G=1, D=40),
        LatentCase(dtype=FP16, lengths="one", N=1, S=130, R=33, latents=9, H=4, G=2, D=96),
    ],
    ids=str,
)
def test_any_number_of_parts(backend, case, processors, monkeypatch):
    """Tiles of query rows, and shares of the keys, each with parts of its own."""
    monkeypatch.setattr(shares, "_PROCESSORS", processors)
    inputs = case.inputs("cpu")
    assert_right(run_op(inputs), inputs)


def test_nothing_to_see(backend):
    inputs = LatentCase(dtype=BF16, lengths="none", S=0, R=5, latents=0).inputs("cpu")
    results = run_op(inputs)
    assert not results.o.any()
    assert results.lse.eq(-torch.inf).all()
    assert not results.dq.any()


@pytest.mark.parametrize("D", [64, 128])
def test_fp32_in_tf32_where_torch_does(backend, D, tf32):
    inputs = LatentCase(D=D, S=40, R=20, H=1, G=1, N=1).inputs("cpu")
    results = run_op(inputs)
    with fk.use_backend("reference"):
        exact, coarse = (
            run_op(inputs._replace(**{n: x.to(dtype) for n, x in inputs._asdict().items() if _is_float(x)}))
            for dtype in (torch.float64, BF16)
        )
    for name in ("o", "dq", "dk_media", "dv_media", "dk_latents", "dv_latents"):
        error, bound = ((getattr(x, name) - getattr(exact, name)).abs().max() for x in (results, coarse))
        assert 1e-6 < error < bound, name


def _is_float(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sizes": lambda s: (*s[:5], 3, *s[6:])}, "heads do not divide"),
        ({"sizes": lambda s: (*s[:7], 0)}, "there are no splits"),
        ({"inputs": lambda x: ((x[0][0] + 4, *x[0][1:]), *x[1:])}, "rows of q must begin and end on 16 bytes"),
    ],
    ids=["heads", "splits", "address"],
)
def test_a_call_that_does_not_fit_is_refused(backend, changed, message, monkeypatch):
    original = module().latent_attention.forward

    def forward(precision, sizes, inputs, *rest):
        given = {"sizes": sizes, "inputs": inputs}
        given = {name: changed[name](value) if name in changed else value for name, value in given.items()}
        original(precision, given["sizes"], given["inputs"], *rest)

    monkeypatch.setattr(module().latent_attention, "forward", forward)
    inputs = replace(LatentCase(), H=4, G=2, D=64).inputs("cpu")
    with pytest.raises((ValueError, TypeError), match=message):
        attend(inputs)
