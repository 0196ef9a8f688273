"""gated_mlp: every number of forward and backward within the error budget."""

from dataclasses import replace

import pytest
import torch

from tests.support.linear_cases import ACTIVATIONS, GATES, Case, assert_right, check, run_op
from tests.support.process import DTYPES

pytestmark = pytest.mark.ops("gated_mlp")
CASE = Case("gated_mlp")
ACTIVATED = [replace(CASE, activation=activation) for activation in ACTIVATIONS]
SWEEP = [
    *ACTIVATED,
    *(replace(CASE, activation=activation, norm="rms", N=7, C=65) for activation in ACTIVATIONS),
    *(replace(CASE, rows=(rows,)) for rows in (1, 3, 63, 65, 127, 300)),
    *(replace(CASE, C=C) for C in (65, 128, 200)),
    *(replace(CASE, N=N, activation=activation) for N in (1, 3, 130) for activation in ("gelu", "swiglu")),
    *(replace(CASE, rows=rows) for rows in ((), (1,), (2, 1, 3, 5))),
    replace(CASE, rows=(300,), C=128, N=200, activation="swiglu"),
    *(replace(CASE, affine=affine, norm=norm) for affine, norm in ((1, "layer"), (0, "layer"), (1, "rms"), (0, "rms"))),
    *(replace(CASE, gate=gate) for gate in GATES if gate != CASE.gate),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_within_the_error_budget(backend, case, dtype):
    check(replace(case, dtype=dtype), backend.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ACTIVATED, ids=str)
def test_recomputed(backend, case, dtype):
    check(replace(case, dtype=dtype, recompute=True), backend.device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ["squared_relu", "swiglu"])
def test_wide_streams_beside_narrow_weights(backend, activation, gate, dtype):
    case = replace(CASE, activation=activation, gate=gate, rows=(127,), dtype=dtype, streams=torch.float32)
    check(case, backend.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_mean_far_from_zero(backend, norm, dtype):
    check(replace(CASE, norm=norm, mean=1000.0, dtype=dtype), backend.device)


@pytest.mark.parametrize("width", [40, 1])
def test_one_channel(backend, width):
    """Of a LayerNorm over one channel nothing is left but the bias."""
    case = replace(CASE, C=1, N=width, gate=None)
    tensors, dy = case.inputs(backend.device)
    results = run_op(case, tensors, dy)
    hidden = tensors["norm_bias"] * tensors["w_in"].T
    torch.testing.assert_close(results["y"], tensors["x"] + hidden.relu().square() @ tensors["w_out"].T)
    assert torch.equal(results["x"], dy)
    assert (results["norm_weight"] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", ["scalar", "one", "vector"])
def test_closed_gate(backend, gate, dtype):
    """At 0 the output is the input, and only the gate learns."""
    case = replace(CASE, gate=gate, dtype=dtype)
    tensors, dy = case.inputs(backend.device)
    tensors["gate"].zero_()
    results = run_op(case, tensors, dy)
    assert torch.equal(results["y"], tensors["x"])
    assert torch.equal(results["x"], dy)
    assert (results["gate"] != 0).all()
    assert all((results[name] == 0).all() for name in ("norm_weight", "norm_bias", "w_in", "w_out"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_hidden(backend, activation, dtype):
    """Where the activations have nearly reached what they tend to."""
    case = replace(CASE, activation=activation, dtype=dtype, gate=None)
    tensors, dy = case.inputs(backend.device)
    tensors["w_in"] *= 8
    assert_right(case, [(tensors, dy, run_op(case, tensors, dy))])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_huge_hidden(backend, activation):
    """At ±1e15 the smooth activations are relu; their powers and exponentials overflow on the way there."""
    tensors, dy = CASE.inputs(backend.device)
    tensors["w_in"] *= 1e15
    results, relu = (run_op(replace(CASE, activation=name), tensors, dy) for name in (activation, "relu"))
    for name in relu:
        torch.testing.assert_close(results[name], relu[name], msg=lambda message, name=name: f"{name}: {message}")
