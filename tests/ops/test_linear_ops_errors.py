"""Every wrong argument of norm_linear, linear_gate_residual and gated_mlp: the error names it, and says what came."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import flamingo_kernels as fk
from tests.support.linear_cases import OPS, Case, apply, run_op

pytestmark = [pytest.mark.ops(op) for op in OPS]
CASES = {
    "norm_linear": Case("norm_linear", rows=(2, 3), C=8, N=6),
    "linear_gate_residual": Case("linear_gate_residual", rows=(2, 3), C=8, N=6),
    "gated_mlp": Case("gated_mlp", rows=(2, 3), C=8, N=6),
    "swiglu": Case("gated_mlp", rows=(2, 3), C=8, N=6, activation="swiglu"),
}
X, VECTOR = torch.zeros(2, 3, 8), torch.zeros(8)
NORMED, GATED, ALL = ("norm_linear", "gated_mlp"), ("linear_gate_residual", "gated_mlp"), OPS
IS_DTYPE = "must be of dtype float32, bfloat16, float16 or float64, got"

# ops, the argument and what it is, the error and its message
WRONG = [
    # no tensors
    (ALL, {"x": None}, TypeError, "x must be a tensor, got NoneType"),
    (("norm_linear", "linear_gate_residual"), {"weight": [1.0]}, TypeError, "weight must be a tensor, got list"),
    (("gated_mlp",), {"w_in": None}, TypeError, "w_in must be a tensor, got NoneType"),
    (("gated_mlp",), {"w_out": 1}, TypeError, "w_out must be a tensor, got int"),
    (("linear_gate_residual",), {"residual": None}, TypeError, "residual must be a tensor, got NoneType"),
    (GATED, {"gate": 0.5}, TypeError, "gate must be a tensor, got float"),
    (NORMED, {"norm_weight": 1}, TypeError, "norm_weight must be a tensor, got int"),
    (NORMED, {"norm_bias": "no"}, TypeError, "norm_bias must be a tensor, got str"),
    # dtypes that nothing computes in
    (ALL, {"x": X.int()}, TypeError, f"x {IS_DTYPE} torch.int32"),
    (ALL, {"x": X.to(torch.float8_e4m3fn)}, TypeError, f"x {IS_DTYPE} torch.float8_e4m3fn"),
    (("norm_linear",), {"weight": torch.zeros(6, 8).bool()}, TypeError, f"weight {IS_DTYPE} torch.bool"),
    (("gated_mlp",), {"w_out": torch.zeros(8, 6).to(torch.complex64)}, TypeError, f"w_out {IS_DTYPE} torch.complex64"),
    (GATED, {"gate": torch.zeros(1).long()}, TypeError, f"gate {IS_DTYPE} torch.int64"),
    # dtypes that do not go together
    (
        ALL,
        {"x": X.bfloat16()},
        TypeError,
        "x must be of dtype float32, beside weights of the first, got torch.bfloat16",
    ),
    (ALL, {"x": X.double()}, TypeError, "x must be of dtype float32, beside weights of the first, got torch.float64"),
    (NORMED, {"norm_weight": VECTOR.half()}, TypeError, "norm_weight must be of dtype float32, .* got torch.float16"),
    (NORMED, {"norm_bias": VECTOR.double()}, TypeError, "norm_bias must be of dtype float32, .* got torch.float64"),
    (GATED, {"gate": torch.zeros(1).half()}, TypeError, "gate must be of dtype float32, .* got torch.float16"),
    (
        ("linear_gate_residual",),
        {"residual": torch.zeros(2, 3, 6).half()},
        TypeError,
        "residual must be of dtype float32",
    ),
    (
        ("norm_linear", "linear_gate_residual"),
        {"weight": torch.zeros(6, 8).bfloat16(), "x": X.half()},
        TypeError,
        "x must be of dtype bfloat16 or float32, beside weights of the first, got torch.float16",
    ),
    (
        ("gated_mlp",),
        {"w_out": torch.zeros(8, 6).bfloat16()},
        TypeError,
        "w_out must be of w_in's dtype, got torch.bfloat16",
    ),
    # devices
    (("norm_linear", "linear_gate_residual"), {"x": X.to("meta")}, ValueError, "weight must be on x's device, got cpu"),
    (("gated_mlp",), {"w_out": torch.zeros(8, 6).to("meta")}, ValueError, "w_out must be on x's device, got meta"),
    (NORMED, {"norm_weight": VECTOR.to("meta")}, ValueError, "norm_weight must be on x's device, got meta"),
    (NORMED, {"norm_bias": VECTOR.to("meta")}, ValueError, "norm_bias must be on x's device, got meta"),
    (GATED, {"gate": torch.zeros(1).to("meta")}, ValueError, "gate must be on x's device, got meta"),
    (
        ("linear_gate_residual",),
        {"residual": X[..., :6].to("meta")},
        ValueError,
        "residual must be on x's device, got meta",
    ),
    # shapes
    (NORMED, {"x": X[0, 0, 0]}, ValueError, r"x must be of shape \[\.\.\., C\], got .*\[\]"),
    (("linear_gate_residual",), {"x": X[0, 0, 0]}, ValueError, r"x must be of shape \[\.\.\., K\], got .*\[\]"),
    (("norm_linear",), {"weight": VECTOR}, ValueError, r"weight must be of rank 2, \[out, in\], got .*\[8\]"),
    (("gated_mlp",), {"w_in": X}, ValueError, r"w_in must be of rank 2, \[out, in\], got .*\[2, 3, 8\]"),
    (
        ("norm_linear", "linear_gate_residual"),
        {"x": X[..., :7]},
        ValueError,
        r"weight must be of x's width, got .*\[6, 8\]",
    ),
    (("gated_mlp",), {"x": X[..., :7]}, ValueError, r"w_in must be of x's width, got .*\[6, 8\]"),
    (
        ("gated_mlp",),
        {"w_out": torch.zeros(8, 7)},
        ValueError,
        r"w_out must be of shape \[C, F\] where w_in is \[F, C\], got .*\[8, 7\]",
    ),
    (("gated_mlp",), {"w_out": torch.zeros(7, 6)}, ValueError, r"w_out must be of shape \[C, F\] .*, got .*\[7, 6\]"),
    (("gated_mlp",), {"w_out": torch.zeros(6)}, ValueError, r"w_out must be of shape \[C, F\] .*, got .*\[6\]"),
    (
        ("swiglu",),
        {"w_out": torch.zeros(8, 12)},
        ValueError,
        r"w_out must be of shape \[C, F\] where w_in is \[2F, C\], got .*\[8, 12\]",
    ),
    (
        ("swiglu",),
        {"w_in": torch.zeros(13, 8)},
        ValueError,
        r"w_out must be of shape \[C, F\] where w_in is \[2F, C\], got .*\[8, 6\]",
    ),
    (
        NORMED,
        {"norm_weight": VECTOR[:1]},
        ValueError,
        r"norm_weight must be of shape \[C\], C the width of x, got .*\[1\]",
    ),
    (
        NORMED,
        {"norm_weight": X},
        ValueError,
        r"norm_weight must be of shape \[C\], C the width of x, got .*\[2, 3, 8\]",
    ),
    (NORMED, {"norm_bias": VECTOR[0]}, ValueError, r"norm_bias must be of shape \[C\], C the width of x, got .*\[\]"),
    (GATED, {"gate": torch.zeros(2)}, ValueError, r"gate must be of shape \[\], \[1\] or \[C\], got .*\[2\]"),
    (GATED, {"gate": torch.zeros(1, 1)}, ValueError, r"gate must be of shape \[\], \[1\] or \[C\], got .*\[1, 1\]"),
    (
        ("linear_gate_residual",),
        {"gate": VECTOR},
        ValueError,
        r"gate must be of shape \[\], \[1\] or \[C\], got .*\[8\]",
    ),
    (
        ("linear_gate_residual",),
        {"residual": X},
        ValueError,
        r"residual must be of shape \[\.\.\., C\] .*, got .*\[2, 3, 8\]",
    ),
    (
        ("linear_gate_residual",),
        {"residual": X[:1, :, :6]},
        ValueError,
        r"residual must be of shape .*, got .*\[1, 3, 6\]",
    ),
    (("linear_gate_residual",), {"residual": X[0, :, :6]}, ValueError, r"residual must be of shape .*, got .*\[3, 6\]"),
    # options
    (NORMED, {"norm": "batch"}, ValueError, "norm must be one of layer, rms, got 'batch'"),
    (NORMED, {"norm": None}, ValueError, "norm must be one of layer, rms, got None"),
    (NORMED, {"norm": "rms"}, ValueError, "norm_bias must be None with norm='rms', got a tensor"),
    (NORMED, {"norm_weight": None}, ValueError, "norm_bias must be None without norm_weight, got a tensor"),
    (NORMED, {"eps": "small"}, TypeError, "eps must be a number, got str"),
    (NORMED, {"eps": torch.tensor(1e-5)}, TypeError, "eps must be a number, got a tensor"),
    (NORMED, {"eps": -1e-5}, ValueError, "eps must be at least 0, got -1e-05"),
    (
        ("gated_mlp",),
        {"activation": "tanh"},
        ValueError,
        "activation must be one of squared_relu, .*, swiglu, got 'tanh'",
    ),
    (("gated_mlp",), {"recompute": 1}, TypeError, "recompute must be a bool, got int"),
]


@pytest.mark.parametrize(
    ("case", "wrong", "error", "message"),
    [pytest.param(name, *rest, id=f"{name}-{i}") for i, (names, *rest) in enumerate(WRONG) for name in names],
)
def test_wrong_argument(backend, case, wrong, error, message):
    case = CASES[case]
    tensors, _ = case.inputs(backend.device)
    arguments = {**tensors, **case.options()}
    arguments |= {name: _to(backend.device, value) for name, value in wrong.items()}
    message = message.replace("cpu", backend.device)
    with pytest.raises(error, match=f"^{case.op}: {message}"):
        getattr(fk, case.op)(**arguments)


def _to(device: str, value: object) -> object:
    return value.to(device) if isinstance(value, Tensor) and value.device.type != "meta" else value


@pytest.mark.parametrize("op", OPS)
def test_dtypes(backend, op):
    """Each dtype runs or is refused by name."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        case = replace(CASES[op], dtype=dtype)
        if backend.name in ("triton", "cuda") and dtype == torch.float64:
            with pytest.raises(TypeError, match=rf"^{op}: .* must be .*float32.*, got .*float64"):
                run_op(case, *case.inputs(backend.device))
        else:
            assert run_op(case, *case.inputs(backend.device))["y"].dtype == dtype


@pytest.mark.parametrize("op", OPS)
def test_on_meta_tensors(op):
    """Shapes and dtypes without any kernel."""
    case = replace(CASES[op], dtype=torch.bfloat16)
    y = apply(case, case.inputs("meta")[0])
    assert (y.device.type, y.dtype) == ("meta", torch.bfloat16)
    assert y.shape == (2, 3, 8 if op == "gated_mlp" else 6)
