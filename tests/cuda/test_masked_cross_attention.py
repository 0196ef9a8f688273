"""The CUDA kernels of masked cross-attention: bytes and bank conflicts by count, tf32, and calls that they refuse."""

from dataclasses import replace

import pytest
import torch

import flamingo_kernels as fk
from tests.support.attention_cases import Case, run_op
from tests.support.dense_attention import Inputs
from tests.support.process import EMULATED

if not EMULATED:
    pytest.skip("runs on the emulated kernels (pytest -p tests.cusim.plugin)", allow_module_level=True)

from flamingo_kernels.cuda import masked_cross_attention as kernels
from flamingo_kernels.cuda._module import module

BF16, FP32 = torch.bfloat16, torch.float32
EMULATOR = module().emulator

# ---- bytes and bank conflicts ---------------------------------------------------------------------------------------
MEDIA_APART = [  # one row and two heads of benchmarks' shapes, their media evenly spread
    Case(dtype=BF16, B=1, T=256, M=6, L=64),
    Case(dtype=BF16, B=1, T=256, M=5, L=64, D=128),
    Case(dtype=BF16, B=1, T=128, M=2, L=64, D=96),
    Case(dtype=FP32, B=1, T=192, M=3, L=64, D=64),
    Case(dtype=BF16, B=3, beams=3, T=1, M=9, L=64, kind="full"),
]


def _spread(case: Case) -> Inputs:
    inputs = case.inputs("cpu")
    if case.kind == "full":
        return inputs
    locations = torch.zeros(case.B, case.T, dtype=torch.bool)
    locations[:, torch.arange(case.M) * case.T // case.M] = True
    return inputs._replace(**fk.media_intervals(locations, case.L, case.M)._asdict())


def _moved() -> int:
    counted = EMULATOR.counters()
    for what in ("ldmatrix", "cp_async", "shared"):
        assert counted[f"{what}_wavefronts"] == counted[f"{what}_least"], what
    return counted["global_bytes_read"] + counted["global_bytes_written"]


@pytest.mark.parametrize("case", MEDIA_APART, ids=str)
def test_bytes_and_bank_conflicts(backend, case):
    """Forward and backward move at most 1.1 times what comes in and goes out, and no bank is met twice."""
    inputs = _spread(case)
    EMULATOR.reset()
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    o, lse = fk.masked_cross_attention(q, k, v, (inputs.start, inputs.end), return_lse=True)
    forward = _moved()
    EMULATOR.reset()
    torch.autograd.grad(o, (q, k, v), inputs.do)
    backward = _moved()
    queries, keys = q.nbytes, k.nbytes
    intervals = inputs.start.nbytes + inputs.end.nbytes
    assert forward <= 1.1 * (2 * queries + 2 * keys + lse.nbytes + intervals)
    if case.kind != "full":  # there, rows see several blocks of keys: one pass over queries and one over keys
        assert backward <= 1.1 * (4 * queries + 4 * keys + lse.nbytes + intervals)


# ---- tf32 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [Case(D=D, T=T, B=1, L=40) for D in (64, 96, 128) for T in (1, 40)], ids=str)
def test_fp32_in_tf32_where_torch_does(backend, case, tf32):
    """tf32 has three bits more than bf16, whose own error, at 16 roundings more a product, it stays below."""
    inputs = replace(case, kind="random").inputs("cpu")
    results = run_op(inputs)
    with fk.use_backend("reference"):
        exact = run_op(Inputs(*(x.double() for x in inputs[:4]), *inputs[4:]))
        bf16 = run_op(Inputs(*(x.bfloat16() for x in inputs[:4]), *inputs[4:]))
    for name in ("o", "dq", "dk", "dv"):
        error, coarse = ((getattr(x, name) - getattr(exact, name)).abs().max() for x in (results, bf16))
        assert 0 < error < coarse, name
    assert error > 1e-5  # nor is it fp32


# ---- refused --------------------------------------------------------------------------------------------------------


def _call(monkeypatch, **changed: object) -> None:
    """A forward call of the module itself with some arguments replaced."""
    original = module().masked_cross_attention.forward

    def forward(precision, sizes, q, k, v, start, end, o, lse, scale, stream):
        given = {"precision": precision, "sizes": sizes, "q": q, "stream": stream}
        given = {name: changed[name](value) if name in changed else value for name, value in given.items()}
        original(given["precision"], given["sizes"], given["q"], k, v, start, end, o, lse, scale, given["stream"])

    monkeypatch.setattr(module().masked_cross_attention, "forward", forward)
    inputs = Case(T=3).inputs("cpu")
    kernels.forward(*inputs[:3], inputs.start, inputs.end, 1.0)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": lambda q: (q[0] + 4, *q[1:])}, ValueError, "rows of q must begin and end on 16 bytes"),
        ({"q": lambda q: (*q[:2], q[2] + 1, q[3])}, ValueError, "rows of q must begin and end on 16 bytes"),
        ({"sizes": lambda s: (*s[:5], 132, s[6])}, ValueError, "head dim of 1 to 128 was expected, got 132"),
        ({"sizes": lambda s: (s[0], 2**31, *s[2:])}, ValueError, "than 32 bits count"),
        ({"sizes": lambda s: (*s[:4], 3, *s[5:])}, ValueError, "heads or rows do not divide"),
        ({"precision": lambda _: 7}, ValueError, "no precision has the code 7"),
        (
            {"stream": lambda _: (0, 0)},
            RuntimeError,
            "masked_cross_attention_fwd_kernel: the emulated module takes CPU",
        ),
    ],
    ids=["address", "stride", "head dim", "rows", "heads", "precision", "device"],
)
def test_a_call_that_does_not_fit_is_refused(backend, changed, error, message, monkeypatch):
    with pytest.raises(error, match=f"masked_cross_attention.*{message}|{message}"):
        _call(monkeypatch, **changed)


def test_heads_too_long_are_refused_by_name(backend):
    inputs = Case(T=3, D=136).inputs("cpu")
    with pytest.raises(
        NotImplementedError, match="'cuda', which was asked for, takes a head dim of at most 128, got 136"
    ):
        run_op(inputs)
