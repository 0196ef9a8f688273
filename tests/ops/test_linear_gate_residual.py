"""linear_gate_residual: every number of forward and backward within the error budget."""

from dataclasses import replace

import pytest
import torch

from tests.support.linear_cases import GATES, Case, check, run_op
from tests.support.process import DTYPES

pytestmark = pytest.mark.ops("linear_gate_residual")
CASE = Case("linear_gate_residual")
SWEEP = [
    *(replace(CASE, rows=(rows,)) for rows in (1, 3, 63, 65, 127, 300)),
    *(replace(CASE, C=C) for C in (1, 65, 128, 200)),
    *(replace(CASE, N=N) for N in (1, 3, 130)),
    *(replace(CASE, rows=rows) for rows in ((), (1,), (2, 1, 3, 5))),
    *(replace(CASE, N=1, gate=gate) for gate in GATES),
    replace(CASE, rows=(300,), C=200, N=130),
    *(replace(CASE, gate=gate) for gate in GATES if gate != CASE.gate),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_within_the_error_budget(backend, case, dtype):
    check(replace(case, dtype=dtype), backend.device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [replace(CASE, rows=(127,), C=65, gate=gate) for gate in GATES], ids=str)
def test_wide_streams_beside_narrow_weights(backend, case, dtype):
    check(replace(case, dtype=dtype, streams=torch.float32), backend.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", ["scalar", "one", "vector"])
def test_closed_gate(backend, gate, dtype):
    """At 0 the output is the residual, and only the gate learns."""
    case = replace(CASE, gate=gate, dtype=dtype)
    tensors, dy = case.inputs(backend.device)
    tensors["gate"].zero_()
    results = run_op(case, tensors, dy)
    assert torch.equal(results["y"], tensors["residual"])
    assert torch.equal(results["residual"], dy)
    assert (results["x"] == 0).all()
    assert (results["weight"] == 0).all()
    assert (results["gate"] != 0).all()


@pytest.mark.parametrize("value", [20.0, -20.0])
def test_wide_open_gate(backend, value):
    """Its tanh is ±1, and its gradient vanishes."""
    case = replace(CASE, gate="one")
    tensors, dy = case.inputs(backend.device)
    tensors["gate"].fill_(value)
    results = run_op(case, tensors, dy)
    assert (results["gate"] == 0).all()
    if value > 0:
        alone = run_op(replace(case, gate=None), {**tensors, "gate": None}, dy)
        assert all(torch.equal(results[name], alone[name]) for name in alone)
