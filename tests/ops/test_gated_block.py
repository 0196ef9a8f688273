"""gated_block, both halves of the gated block as one op: numbers, contract, what it does without gradients, errors."""

import random
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.memory import saved_bytes
from flamingo_kernels.ops.gated_cross_attention import gated_cross_attention
from flamingo_kernels.ops.gated_mlp import gated_mlp
from tests.support import gated_attention_cases
from tests.support.attention_cases import KINDS
from tests.support.gated_attention_cases import GATES, GatedCase, GatedInputs, check, run
from tests.support.linear_cases import ACTIVATIONS
from tests.support.process import DTYPES, normal_process, pick

pytestmark = pytest.mark.ops("gated_cross_attention", "gated_mlp")
OP = torch.ops.flamingo_kernels.gated_block.default
VARIANTS = [
    GatedCase(F=48),
    GatedCase(F=65, gate="vector", norm="rms", activation="gelu"),
    GatedCase(F=24, gate=None, affine=0, H=2, G=2, D=40, C=24, activation="swiglu"),
    GatedCase(F=33, kind="all", B=4, beams=2, gate="one", affine=1, C=33, activation="gelu_tanh"),
]


def _random_case(seed: int) -> GatedCase:
    draw = random.Random(seed)
    dtype = draw.choice(DTYPES)
    return GatedCase(
        dtype=dtype,
        streams=draw.choice((None, torch.float32)) if dtype.itemsize == 2 else None,
        kind=draw.choice([kind for kind in KINDS if kind != "one_key"]),  # whose exact gradients of q are 0
        B=draw.choice((1, 2)),
        T=draw.choice((2, 3, draw.randint(4, 90))),
        C=draw.choice((16, 40, draw.randint(9, 130))),
        D=draw.choice((16, 40)),
        norm=draw.choice(("layer", "rms")),
        affine=draw.randint(0, 2),
        gate=draw.choice(tuple(GATES)),
        F=draw.choice((32, draw.randint(9, 130))),
        activation=draw.choice(ACTIVATIONS),
        seed=seed,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_variants(backend, case, dtype):
    check(replace(case, dtype=dtype), backend.device)


@pytest.mark.parametrize("streams", [torch.float32, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_streams_wider_than_the_weights(backend, dtype, streams):
    check(replace(VARIANTS[0], dtype=dtype, streams=streams, T=65), backend.device)


@pytest.mark.parametrize("case", [_random_case(seed) for seed in range(pick((30,), (8,))[0])], ids=str)
def test_random_cases(backend, case):
    check(case, backend.device)


@pytest.mark.parametrize("C", [8200, 8195])
def test_rows_wider_than_registers(backend, C):
    check(GatedCase(torch.bfloat16, B=1, T=3, C=C, H=1, G=1, D=8, M=1, F=8), backend.device)


@pytest.mark.parametrize("dtype", pick(DTYPES, [torch.bfloat16]), ids=str)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_it_is_its_halves(backend, case, dtype):
    """To the bit, y and all gradients."""
    case = replace(case, dtype=dtype)
    inputs = case.inputs(backend.device)

    def one_after_the_other(x: Tensor, attention: dict, mlp: dict) -> Tensor:
        return gated_mlp(gated_cross_attention(x, **attention), **mlp)

    together = run(case, inputs)
    with mock.patch.object(gated_attention_cases, "gated_block", one_after_the_other):
        apart = run(case, inputs)
    assert all(torch.equal(together[name], apart[name]) for name in apart)


@pytest.mark.parametrize("sizes", [{"B": 0}, {"T": 0}, {"M": 0}, {"kind": "empty"}], ids=str)
@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_where_nothing_is_seen(backend, gate, sizes):
    """The feed-forward is left, and attention gets no gradient."""
    case = GatedCase(F=48, gate=gate, **sizes)
    inputs = case.inputs(backend.device)
    x, mlp = inputs.tensors["x"], {name: inputs.tensors[ours] for name, ours in gated_attention_cases.MLP_NAMES.items()}
    results = run(case, inputs)
    assert torch.equal(results["y"], gated_mlp(x, **mlp))
    assert all((results[name] == 0).all() for name in ("norm_weight", "w_q", "k", "v", "w_out", "gate"))


@pytest.mark.parametrize("gate", GATES)
def test_closed_gates_are_the_identity(backend, gate):
    case = GatedCase(F=48, gate=gate or "scalar")
    inputs = case.inputs(backend.device)
    for name in ("gate", "ff_gate"):
        inputs.tensors[name] = torch.zeros_like(inputs.tensors[name])
    results = run(case, inputs)
    assert torch.equal(results["y"], inputs.tensors["x"])
    assert torch.equal(results["x"], inputs.dy)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_without_gradients_it_gives_the_same(backend, case):
    inputs = case.inputs(backend.device)
    x = inputs.tensors["x"].clone()
    expected = run(case, inputs)["y"]
    with torch.no_grad():
        assert torch.equal(case.apply(inputs, inputs.tensors), expected)
    assert torch.equal(inputs.tensors["x"], x)


@pytest.mark.parametrize("dtype", pick(DTYPES, [torch.bfloat16]), ids=str)
@pytest.mark.parametrize("case", VARIANTS[:2], ids=str)
def test_same_inputs_same_bits(backend, case, dtype):
    case = replace(case, dtype=dtype)
    inputs = case.inputs(backend.device)
    first, second = run(case, inputs), run(case, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strides(backend):
    case = VARIANTS[0]
    inputs = case.inputs(backend.device)
    expected = run(case, inputs)
    strided = {name: x if x.ndim < 2 else x.mT.contiguous().mT for name, x in inputs.tensors.items()}
    results = run(case, inputs._replace(tensors=strided, dy=inputs.dy.mT.contiguous().mT))
    for name, x in results.items():
        torch.testing.assert_close(x, expected[name], msg=name)


# ---- contract -------------------------------------------------------------------------------------------------------


def _arguments(case: GatedCase, inputs: GatedInputs, save: bool, backend: str) -> list:
    t = inputs.tensors
    attention = [t[name] for name in ("x", "norm_weight", "norm_bias", "w_q", "k", "v")]
    attention += [*inputs.intervals, t["w_out"], t["gate"], case.norm, 1e-5, case.D**-0.5]
    mlp = [t[name] for name in ("ff_norm_weight", "ff_norm_bias", "w_in", "w_back", "ff_gate")]
    return [*attention, *mlp, case.activation, case.norm, 1e-5, save, backend]


@pytest.mark.parametrize("streams", [None, torch.float32], ids=str)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_opcheck(backend, case, streams):
    case = replace(case, dtype=torch.bfloat16, streams=streams, T=5)
    inputs = case.inputs(backend.device)
    torch.library.opcheck(OP, _arguments(case, inputs, False, backend.name))
    leaves = {name: x if x is None else x.requires_grad_() for name, x in inputs.tensors.items()}
    torch.library.opcheck(OP, _arguments(case, inputs._replace(tensors=leaves), True, backend.name))


@normal_process
@pytest.mark.parametrize("case", VARIANTS, ids=str)
@pytest.mark.fp64
def test_gradcheck(backend, case):
    sizes = {"T": 3, "C": 4, "H": 2, "D": 2, "M": 2, "L": 2, "F": 3}
    case = replace(case, dtype=torch.float64, activation="gelu", **sizes)
    inputs = case.inputs(backend.device)
    names = [name for name, x in inputs.tensors.items() if x is not None]

    def of(*tensors: Tensor) -> Tensor:
        return case.apply(inputs, inputs.tensors | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(of, [inputs.tensors[name].requires_grad_() for name in names])


WANTED = [*([name] for name in VARIANTS[0].inputs("cpu").tensors), ["x", "ff_gate"], ["w_q", "w_in"]]


@pytest.mark.parametrize("wanted", pick(WANTED, [["x"], ["v"], ["ff_gate"], ["w_q", "w_in"]]), ids=str)
def test_only_what_is_wanted_is_computed(backend, wanted):
    """With the same bits as when everything is."""
    case = VARIANTS[0]
    inputs = case.inputs(backend.device)
    expected = run(case, inputs)
    leaves = {name: x.detach().clone().requires_grad_(name in wanted) for name, x in inputs.tensors.items()}
    case.apply(inputs, leaves).backward(inputs.dy)
    for name, x in leaves.items():
        assert (x.grad is not None) == (name in wanted), name
        assert x.grad is None or torch.equal(x.grad, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    """Weights, keys and values are cast; x, the norms and the gates stay."""
    case = VARIANTS[0]
    inputs = case.inputs(backend.device)
    cast = {name: x.to(dtype) if name in ("k", "v") or name[0] == "w" else x for name, x in inputs.tensors.items()}
    expected = run(case, inputs._replace(tensors=cast))
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.tensors.items()}
    with torch.autocast(backend.device, dtype):
        y = case.apply(inputs, leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
    for name, x in {"y": y, **dict(zip(leaves, gradients, strict=True))}.items():
        assert x.dtype == torch.float32, name
        assert torch.equal(x, expected[name].float()), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_bytes_saved_for_backward(backend, gate, dtype):
    """The text between the halves, what attention gives, the queries on a GPU, and what the activation takes."""
    case = GatedCase(dtype=dtype, F=48, gate=gate)
    inputs = case.inputs(backend.device)
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.tensors.items()}
    came = (*leaves.values(), *inputs.intervals)
    saved, _ = saved_bytes(lambda *_: case.apply(inputs, leaves), came)
    of_heads = case.H * case.D * (2 if backend.name in ("triton", "cuda") else 1)
    lse = (8 if dtype == torch.float64 else 4) * case.H
    assert saved == case.B * case.T * (dtype.itemsize * (case.C + of_heads + case.F) + lse)


@normal_process
def test_compiles_once_for_all_lengths(backend):
    torch._dynamo.reset()
    case = VARIANTS[0]

    def function(leaves: dict[str, Tensor], intervals: tuple[Tensor, Tensor]) -> Tensor:
        inputs = GatedInputs(leaves, intervals, None)
        return case.apply(inputs, leaves | {"x": leaves["x"] * 2}).tanh()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for i, tokens in enumerate((100, 117, 200, 256)):
        inputs = replace(case, T=tokens).inputs(backend.device)
        results = []
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            for each in (compiled, function):
                leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
                y = each(leaves, inputs.intervals)
                results.append((y, *torch.autograd.grad(y.mean(), list(leaves.values()))))
        torch.testing.assert_close(*results)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("x", lambda x: x[0], r"gated_cross_attention: x must be of shape \[B, T, C\]"),
        ("gate", lambda x: x.expand(3), r"gated_cross_attention: gate must be of shape \[\], \[1\] or \[C\]"),
        ("ff_gate", lambda x: x.expand(3), r"gated_mlp: gate must be of shape \[\], \[1\] or \[C\]"),
        ("w_in", lambda x: x[:, 1:], "gated_mlp: w_in must be of x's width"),
        ("w_back", lambda x: x[1:], r"gated_mlp: w_out must be of shape \[C, F\]"),
    ],
)
def test_errors_name_the_half_and_its_argument(backend, name, bad, message):
    case = VARIANTS[0]
    inputs = case.inputs(backend.device)
    with pytest.raises(ValueError, match=f"^{message}"):
        case.apply(inputs, inputs.tensors | {name: bad(inputs.tensors[name])})
