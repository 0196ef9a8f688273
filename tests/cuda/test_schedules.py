"""Every op on the emulated kernels, in several orders of its threads and with poisoned margins around every tensor.

They give the same bits in every order. tests/cuda/test_sanitizers.py runs this file under sanitizers, too.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flamingo_kernels as fk
from flamingo_kernels import _backends as choice
from tests.cusim.margins import Margins, margins
from tests.support import attention_cases, gated_attention_cases, latent_attention_cases, linear_cases, media_kv_cases
from tests.support.process import EMULATED

if not EMULATED:
    pytest.skip("runs in the process of the emulator (-p tests.cusim.plugin)", allow_module_level=True)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SCHEDULES = (("random", 0), ("random", 1), ("random", 2), ("descending", 0))
ATTENTION = (
    attention_cases.Case(BF16, "latest", B=2, T=33, H=2, G=1, D=64, M=3, L=24, seed=3),
    attention_cases.Case(FP16, "overlapping", B=2, beams=2, T=19, H=1, G=1, D=96, M=2, L=40),
    attention_cases.Case(FP32, "random", B=1, T=9, H=2, G=2, D=80, M=2, L=17),
    attention_cases.Case(BF16, "random", B=3, beams=3, T=1, H=2, G=1, D=128, M=3, L=16),
)
LATENT = (
    latent_attention_cases.LatentCase(BF16, "ragged", N=2, S=37, R=16, H=2, G=2, D=64),
    latent_attention_cases.LatentCase(FP16, "full", N=1, S=520, R=3, H=1, G=1, D=64),  # split over keys
    latent_attention_cases.LatentCase(FP32, "none", N=1, S=70, R=5, H=1, G=1, D=96),
)
LINEAR = (
    linear_cases.Case("norm_linear", BF16, rows=(1, 9), C=72, N=24),
    linear_cases.Case("norm_linear", FP32, rows=(5,), C=33, N=8, norm="rms"),
    linear_cases.Case("linear_gate_residual", FP16, rows=(2, 5), C=24, N=72),
    linear_cases.Case("linear_gate_residual", FP32, rows=(7,), C=16, N=35, gate="scalar"),
    linear_cases.Case("gated_mlp", BF16, rows=(2, 5), C=40, N=65, activation="swiglu"),
    linear_cases.Case("gated_mlp", FP32, rows=(3,), C=33, N=40, activation="gelu", recompute=True),
)
GATED = (gated_attention_cases.GatedCase(BF16, B=2, T=11, C=40, H=2, G=1, M=2, gate="vector"),)
BLOCKS = (
    gated_attention_cases.GatedCase(BF16, B=2, T=11, C=40, H=2, G=1, M=2, F=48),
    gated_attention_cases.GatedCase(FP32, B=1, T=5, C=33, H=1, G=1, M=1, F=35, norm="rms"),
)
MEDIA = (media_kv_cases.MediaCase(BF16, rows=(2, 9), V=40, dims=(16, 8)),)

Run = Callable[[Margins], list[Tensor]]


def _attention(case: attention_cases.Case) -> Run:
    return lambda made: list(attention_cases.run_op(_guarded(case.inputs("cpu"), made)))


def _latent(case: latent_attention_cases.LatentCase) -> Run:
    return lambda made: list(latent_attention_cases.run_op(_guarded(case.inputs("cpu"), made)))


def _linear(case: linear_cases.Case) -> Run:
    def run(made: Margins) -> list[Tensor]:
        tensors, dy = case.inputs("cpu")
        return list(linear_cases.run_op(case, _guarded(tensors, made), made.around(dy)).values())

    return run


def _gated(case: gated_attention_cases.GatedCase) -> Run:
    def run(made: Margins) -> list[Tensor]:
        inputs = case.inputs("cpu")
        inputs = inputs._replace(tensors=_guarded(inputs.tensors, made), dy=made.around(inputs.dy))
        return list(gated_attention_cases.run(case, inputs).values())

    return run


def _media(case: media_kv_cases.MediaCase) -> Run:
    return lambda made: list(media_kv_cases.run_op(case.inputs("cpu").map(made.around)).values())


def _guarded(tensors, made: Margins):
    """A dict or a named tuple, with margins around its tensors."""
    if isinstance(tensors, dict):
        return {name: made.around(x) if isinstance(x, Tensor) else x for name, x in tensors.items()}
    return tensors._replace(**{n: made.around(x) for n, x in tensors._asdict().items() if isinstance(x, Tensor)})


RUNS = {
    **{("masked_cross_attention", str(case)): _attention(case) for case in ATTENTION},
    **{("latent_attention", str(case)): _latent(case) for case in LATENT},
    **{(case.op, str(case)): _linear(case) for case in LINEAR},
    **{("gated_cross_attention", str(case)): _gated(case) for case in GATED},
    **{("gated_block", str(case)): _gated(case) for case in BLOCKS},
    **{("media_kv", str(case)): _media(case) for case in MEDIA},
}


@pytest.mark.parametrize(("op", "case"), RUNS, ids=str)
def test_every_order_gives_the_same_bits(op: str, case: str) -> None:
    if not choice._has("cuda", op):
        pytest.skip(f"the backend does not have {op}")
    from flamingo_kernels import _cuda

    results = []
    try:
        for order, seed in SCHEDULES:
            _cuda.emulator.order, _cuda.emulator.seed = order, seed
            with fk.use_backend("cuda"), margins() as made:
                results.append([x.clone() for x in RUNS[op, case](made)])
    finally:
        _cuda.emulator.order, _cuda.emulator.seed = "random", 0
    for x in results[0]:
        assert not x.isnan().any()
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
