"""Every op, forward and backward, on a few cases: for what has to hold for all of them alike."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.support import (
    attention_cases,
    gated_attention_cases,
    latent_attention_cases,
    linear_cases,
    media_kv_cases,
)

Run = Callable[[], list[Tensor]]  # the op's outputs and gradients


def runs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Run]:
    """By "<op> <case>": what runs the op on inputs made before, on the backend in force.

    Large enough that there is work for several threads.
    """
    return {
        f"{op} {case}": run
        for op, cases in (
            ("masked_cross_attention", _masked_cross_attention(dtype, device)),
            ("gated_cross_attention", _gated_attention(dtype, device)),
            ("gated_block", _gated_attention(dtype, device, F=200)),
            ("latent_attention", _latent_attention(dtype, device)),
            ("media_kv", _media_kv(dtype, device)),
            *((op, _linear(op, dtype, device)) for op in linear_cases.OPS),
        )
        for case, run in cases.items()
    }


def _masked_cross_attention(dtype: torch.dtype, device: str) -> dict[str, Run]:
    def run(inputs: attention_cases.Inputs) -> list[Tensor]:
        return list(attention_cases.run_op(inputs))

    cases = [
        attention_cases.Case(dtype, "latest", B=4, T=130, M=3, L=64),
        attention_cases.Case(dtype, "all", B=1, T=260, H=4, G=2, M=9, L=64),  # split over keys
        attention_cases.Case(dtype, "random", B=4, beams=2, T=65),
    ]
    return {str(case): partial(run, case.inputs(device)) for case in cases}


def _gated_attention(dtype: torch.dtype, device: str, F: int = 0) -> dict[str, Run]:
    def run(case: gated_attention_cases.GatedCase, inputs: gated_attention_cases.GatedInputs) -> list[Tensor]:
        return list(gated_attention_cases.run(case, inputs).values())

    cases = [gated_attention_cases.GatedCase(dtype, B=3, T=130, C=160, gate=gate, F=F) for gate in ("scalar", "vector")]
    return {str(case): partial(run, case, case.inputs(device)) for case in cases}


def _latent_attention(dtype: torch.dtype, device: str) -> dict[str, Run]:
    def run(inputs: latent_attention_cases.LatentInputs) -> list[Tensor]:
        return list(latent_attention_cases.run_op(inputs))

    cases = [
        latent_attention_cases.LatentCase(dtype, "ragged", N=3, S=130, R=64),
        latent_attention_cases.LatentCase(dtype, "none", N=1, S=600, R=64, H=4),
    ]
    return {str(case): partial(run, case.inputs(device)) for case in cases}


def _media_kv(dtype: torch.dtype, device: str) -> dict[str, Run]:
    def run(inputs: media_kv_cases.MediaInputs) -> list[Tensor]:
        return list(media_kv_cases.run_op(inputs).values())

    cases = [
        media_kv_cases.MediaCase(dtype, rows=(3, 130), V=160, dims=(64, 32), norms=norms) for norms in (True, False)
    ]
    return {str(case): partial(run, case.inputs(device)) for case in cases}


def _linear(op: str, dtype: torch.dtype, device: str) -> dict[str, Run]:
    def run(case: linear_cases.Case, tensors: linear_cases.Tensors, dy: Tensor) -> list[Tensor]:
        return list(linear_cases.run_op(case, tensors, dy).values())

    cases = [linear_cases.Case(op, dtype, rows=(3, 130), C=160, N=200)]
    if op == "gated_mlp":
        cases.append(linear_cases.Case(op, dtype, rows=(390,), C=160, N=200, activation="swiglu", recompute=True))
        cases.append(linear_cases.Case(op, dtype, rows=(390,), C=160, N=200, norm="rms", gate="scalar"))
    return {str(case): partial(run, case, *case.inputs(device)) for case in cases}
