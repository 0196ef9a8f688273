"""What holds for norm_linear, linear_gate_residual and gated_mlp alike: random cases, zero sizes, NaN, equal bits."""

import concurrent.futures
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.support.linear_cases import ACTIVATIONS, GATES, OPS, Case, Tensors, assert_right, check, run_op
from tests.support.process import DTYPES, only_cpp

pytestmark = [pytest.mark.ops(op) for op in OPS]
# the instruction sets below this CPU's, whose kernels run in the other tests
SMALLER = {"AVX512": ["avx2", "default"], "AVX2": ["default"]}.get(torch.backends.cpu.get_cpu_capability(), [])
SHAPED = [
    Case("norm_linear", rows=(130,), C=200, N=130),
    Case("linear_gate_residual", rows=(130,), C=200, N=130),
    Case("linear_gate_residual", rows=(130,), C=200, N=130, gate="one"),
    Case("gated_mlp", rows=(130,), C=96, N=200, gate="scalar"),
    Case("gated_mlp", rows=(130,), C=96, N=200, activation="swiglu", recompute=True),
]
# rows that are too wide for the registers of a block of threads
WIDE = [
    Case("norm_linear", rows=(37,), C=8200, N=33, mean=3.0),
    Case("norm_linear", torch.bfloat16, torch.float32, rows=(5,), C=12288, N=33, norm="rms"),
    Case("gated_mlp", rows=(34,), C=8200, N=33, gate=None),
]


def _random_case(seed: int) -> Case:
    draw = random.Random(seed)
    dtype = draw.choice(DTYPES)
    narrow = dtype in (torch.bfloat16, torch.float16)
    return Case(
        op=OPS[seed % len(OPS)],
        dtype=dtype,
        streams=draw.choice((None, torch.float32)) if narrow else None,
        rows=tuple(draw.choice((1, 2, draw.randint(3, 70))) for _ in range(draw.randint(0, 2))),
        C=draw.choice((8, 16, 64, draw.randint(2, 150))),
        N=draw.choice((8, 32, 64, draw.randint(1, 150))),
        norm=draw.choice(("layer", "rms")),
        affine=draw.randint(0, 2),
        gate=draw.choice(tuple(GATES)),
        activation=draw.choice(ACTIVATIONS),
        recompute=draw.random() < 0.3,
        mean=draw.choice((0.0, 0.0, draw.uniform(-20, 20))),
        seed=seed,
    )


@pytest.mark.parametrize("case", [_random_case(seed) for seed in range(60)], ids=str)
def test_random_cases(backend, case):
    check(case, backend.device)


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_wide_rows(backend, case):
    check(case, backend.device)


@only_cpp
@pytest.mark.parametrize("capability", SMALLER)
def test_other_instruction_sets(backend, capability):
    """ATEN_CPU_CAPABILITY takes the place of a smaller CPU, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-k", "cpu-cpu and seed1", f"{__file__}::test_random_cases"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-2000:]
    assert "passed" in process.stdout


# ---- zero sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("sizes", [{"rows": (0,)}, {"rows": (2, 0)}, {"C": 0}, {"N": 0}, {"C": 0, "N": 0}], ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("op", OPS)
def test_zero_sizes(backend, op, gate, sizes, dtype):
    """A sum over nothing is 0: what is left is the residual, and gradients of 0."""
    case = Case(op, **{"dtype": dtype, "rows": (3,), "gate": gate, **sizes})
    tensors, dy = case.inputs(backend.device)
    results = run_op(case, tensors, dy)
    stream = {"norm_linear": None, "linear_gate_residual": "residual", "gated_mlp": "x"}[op]
    assert torch.equal(results.pop("y"), tensors[stream] if stream else torch.zeros_like(dy))
    if stream:
        assert torch.equal(results.pop(stream), dy)
    for name, gradient in results.items():
        assert gradient.shape == tensors[name].shape, name
        assert (gradient == 0).all(), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_zero_hidden_width(backend, activation):
    case = Case("gated_mlp", N=0, activation=activation)
    tensors, dy = case.inputs(backend.device)
    assert torch.equal(run_op(case, tensors, dy)["y"], tensors["x"])


# ---- what is not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_bad_row_reaches_no_other_row(backend, op, dtype, value):
    """Of x, a residual or dy: the others of y and of dx have the same bits as without it."""
    case = Case(op, dtype, rows=(70,), activation="gelu_tanh")
    tensors, dy = case.inputs(backend.device)
    clean = run_op(case, tensors, dy)
    row = 37
    others = torch.arange(70, device=backend.device) != row
    for name in [name for name in ("x", "residual", "dy") if name in (*tensors, "dy")]:
        given = {**tensors, "dy": dy}
        given[name] = given[name].clone()
        given[name][row, 5] = value
        results = run_op(case, given, given.pop("dy"))
        assert not results["x" if name == "dy" else "y"][row].isfinite().all(), name
        for row_wise in ("y", "x"):
            assert torch.equal(results[row_wise][others], clean[row_wise][others]), (name, row_wise)


@pytest.mark.parametrize("case", SHAPED, ids=str)
def test_a_nan_among_the_weights_is_not_hidden(backend, case):
    tensors, dy = case.inputs(backend.device)
    for name in (name for name in ("weight", "w_in", "w_out", "norm_weight", "gate") if name in tensors):
        bad = tensors[name].clone()
        bad.view(-1)[-1] = float("nan")
        y = run_op(case, tensors | {name: bad}, dy)["y"]
        assert y.isnan().any(-1).all(), name


# ---- equal bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPED, ids=str)
def test_same_inputs_same_bits(backend, case, dtype):
    case = replace(case, dtype=dtype)
    tensors, dy = case.inputs(backend.device)
    first = run_op(case, tensors, dy)
    for _ in range(3):
        assert _identical(run_op(case, tensors, dy), first)


@only_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SHAPED, replace(SHAPED[0], rows=(700,), C=33, N=24)], ids=str)
def test_same_bits_for_any_number_of_threads(backend, case, dtype):
    case = replace(case, dtype=dtype)
    tensors, dy = case.inputs("cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run_op(case, tensors, dy)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert _identical(run_op(case, tensors, dy), first), threads
    finally:
        torch.set_num_threads(before)


@only_cpp
def test_same_bits_from_many_threads_at_once(backend):
    runs = [(case, *case.inputs("cpu")) for case in (replace(case, dtype=d) for case in SHAPED for d in DTYPES)]
    expected = [run_op(*run) for run in runs]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(map(_identical, pool.map(lambda run: run_op(*run), runs), expected))


@only_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_onednn(backend, dtype):
    """torch can be told to leave oneDNN alone, whose matmuls the C++ kernels call."""
    for case in (replace(case, dtype=dtype) for case in SHAPED):
        tensors, dy = case.inputs("cpu")
        with torch.backends.mkldnn.flags(enabled=False):
            results = run_op(case, tensors, dy)
        assert_right(case, [(tensors, dy, results)])


def _identical(a: Tensors, b: Tensors) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)
