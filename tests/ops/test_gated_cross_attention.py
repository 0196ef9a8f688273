"""gated_cross_attention, the attention half of the gated block: numbers, contract, errors."""

import random

import pytest
import torch
from torch import Tensor

from flamingo_kernels.ops.gated_cross_attention import gated_cross_attention
from tests.support.attention_cases import KINDS
from tests.support.gated_attention_cases import GATES, NAMES, GatedCase, check, run
from tests.support.process import DTYPES, normal_process, pick

pytestmark = pytest.mark.ops("gated_cross_attention")
OPS = torch.ops.flamingo_kernels
VARIANTS = [
    GatedCase(),
    GatedCase(gate="vector", norm="rms"),
    GatedCase(gate=None, affine=0, H=2, G=2, D=40, C=24),
    GatedCase(kind="all", B=4, beams=2, gate="one", affine=1),
]


def _random_case(seed: int) -> GatedCase:
    draw = random.Random(seed)
    dtype = draw.choice(DTYPES)
    G, beams = draw.choice((1, 2)), draw.choice((1, 1, 2))
    return GatedCase(
        dtype=dtype,
        streams=draw.choice((None, torch.float32)) if dtype.itemsize == 2 else None,
        kind=draw.choice([kind for kind in KINDS if kind != "one_key"]),  # whose exact gradients of q are 0
        B=beams * draw.choice((1, 2)),
        beams=beams,
        T=draw.choice((2, 3, draw.randint(4, 90))),
        C=draw.choice((16, 40, draw.randint(9, 130))),
        H=G * draw.choice((1, 3)),
        G=G,
        D=draw.choice((16, 40, 64)),
        M=draw.randint(0, 4),
        L=draw.choice((8, 16, 64)),
        norm=draw.choice(("layer", "rms")),
        affine=draw.randint(0, 2),
        gate=draw.choice(tuple(GATES)),
        seed=seed,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_variants(backend, case, dtype):
    check(GatedCase(**{**vars(case), "dtype": dtype}), backend.device)


@pytest.mark.parametrize("case", [_random_case(seed) for seed in range(pick((30,), (8,))[0])], ids=str)
def test_random_cases(backend, case):
    check(case, backend.device)


@pytest.mark.parametrize("sizes", [{"B": 0}, {"T": 0}, {"M": 0}, {"kind": "empty"}], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_where_nothing_is_seen(backend, gate, sizes):
    """The residual is left, and no gradient but its own."""
    case = GatedCase(gate=gate, **sizes)
    inputs = case.inputs(backend.device)
    results = run(case, inputs)
    assert torch.equal(results.pop("y"), inputs.tensors["x"])
    assert torch.equal(results.pop("x"), inputs.dy)
    assert all((gradient == 0).all() for gradient in results.values())


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_closed_gate_is_the_identity(backend, dtype):
    case = GatedCase(dtype=dtype)
    inputs = case.inputs(backend.device)
    inputs.tensors["gate"] = torch.zeros_like(inputs.tensors["gate"])
    results = run(case, inputs)
    assert torch.equal(results["y"], inputs.tensors["x"])
    assert torch.equal(results["x"], inputs.dy)
    assert results["gate"].abs() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VARIANTS[:2], ids=str)
def test_same_inputs_same_bits(backend, case, dtype):
    case = GatedCase(**{**vars(case), "dtype": dtype})
    inputs = case.inputs(backend.device)
    first, second = run(case, inputs), run(case, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strides(backend):
    case = GatedCase()
    inputs = case.inputs(backend.device)
    expected = run(case, inputs)
    strided = {name: x if x.ndim < 2 else x.mT.contiguous().mT for name, x in inputs.tensors.items()}
    results = run(case, inputs._replace(tensors=strided, dy=inputs.dy.mT.contiguous().mT))
    for name, x in results.items():
        torch.testing.assert_close(x, expected[name], msg=name)


# ---- contract -------------------------------------------------------------------------------------------------------


def _arguments(case: GatedCase, device: str) -> list:
    inputs = case.inputs(device)
    given = [inputs.tensors[name] for name in NAMES]
    return [*given[:6], *inputs.intervals, *given[6:], case.norm, 1e-5, case.D**-0.5]


@pytest.mark.parametrize("dtype", pick(DTYPES[:2], DTYPES[:1]), ids=str)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_opcheck(backend, case, dtype):
    case = GatedCase(**{**vars(case), "dtype": dtype, "T": 5})
    arguments = [*_arguments(case, backend.device), backend.name]
    torch.library.opcheck(OPS.gated_cross_attention.default, arguments)
    leaves = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    torch.library.opcheck(OPS.gated_cross_attention.default, leaves)
    *tensors, norm, eps, scale, name = (x.detach() if isinstance(x, Tensor) else x for x in leaves)
    y, *attended = OPS.gated_cross_attention(*tensors, norm, eps, scale, name)
    for flag in (True, False):
        backward = (torch.ones_like(y), *tensors, *attended, norm, eps, scale, [flag] * 8, name)
        torch.library.opcheck(OPS.gated_cross_attention_backward.default, backward)


@normal_process
@pytest.mark.parametrize("case", VARIANTS, ids=str)
@pytest.mark.fp64
def test_gradcheck(backend, case):
    case = GatedCase(**{**vars(case), "dtype": torch.float64, "T": 3, "C": 4, "H": 2, "D": 2, "M": 2, "L": 2})
    inputs = case.inputs(backend.device)
    names = [name for name, x in inputs.tensors.items() if x is not None]

    def of(*tensors: Tensor) -> Tensor:
        return case.apply(inputs, inputs.tensors | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(of, [inputs.tensors[name].requires_grad_() for name in names])


@pytest.mark.parametrize("wanted", [*([name] for name in NAMES), ["x", "gate"], ["k", "w_out"], ["w_q", "v"]], ids=str)
def test_only_what_is_wanted_is_computed(backend, wanted):
    """With the same bits as when everything is."""
    case = GatedCase()
    inputs = case.inputs(backend.device)
    expected = run(case, inputs)
    leaves = {name: x.detach().clone().requires_grad_(name in wanted) for name, x in inputs.tensors.items()}
    case.apply(inputs, leaves).backward(inputs.dy)
    for name, x in leaves.items():
        assert (x.grad is not None) == (name in wanted), name
        assert x.grad is None or torch.equal(x.grad, expected[name]), name


def test_no_double_backward(backend):
    case = GatedCase()
    inputs = case.inputs(backend.device)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.tensors.items()}
    (dx,) = torch.autograd.grad(case.apply(inputs, leaves).sum(), leaves["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    """Weights, keys and values are cast; x, the norm and the gate stay."""
    case = GatedCase()
    inputs = case.inputs(backend.device)
    cast = {name: x.to(dtype) if name in ("w_q", "k", "v", "w_out") else x for name, x in inputs.tensors.items()}
    expected = run(case, inputs._replace(tensors=cast))
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.tensors.items()}
    with torch.autocast(backend.device, dtype):
        y = case.apply(inputs, leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
    for name, x in {"y": y, **dict(zip(leaves, gradients, strict=True))}.items():
        assert x.dtype == torch.float32, name
        assert torch.equal(x, expected[name].float()), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_saved_for_backward(backend, dtype):
    """The formula of the docstring."""
    case = GatedCase(dtype=dtype)
    inputs = case.inputs(backend.device)
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.tensors.items()}
    saved = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        case.apply(inputs, leaves)
    came = {x.untyped_storage().data_ptr() for x in (*leaves.values(), *inputs.intervals)}
    tokens = case.B * case.T
    kept = dtype.itemsize * tokens * case.H * case.D * (2 if backend.name in ("triton", "cuda") else 1)
    kept += (8 if dtype == torch.float64 else 4) * tokens * case.H
    assert sum(size for place, size in saved.items() if place not in came) == kept


@normal_process
def test_compiles_once_for_all_lengths(backend):
    torch._dynamo.reset()
    case = GatedCase()

    def of(inputs):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.tensors.items()}
        y = case.apply(inputs, leaves)
        return y, leaves

    def function(x: Tensor, others: dict[str, Tensor], start: Tensor, end: Tensor) -> Tensor:
        return gated_cross_attention(x * 2, intervals=(start, end), **others).tanh()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for i, tokens in enumerate((100, 117, 200, 256)):
        inputs = GatedCase(T=tokens).inputs(backend.device)
        results = []
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            for each in (compiled, function):
                leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
                y = each(leaves["x"], {n: t for n, t in leaves.items() if n != "x"}, *inputs.intervals)
                results.append((y, *torch.autograd.grad(y.mean(), list(leaves.values()))))
        torch.testing.assert_close(*results)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bad", "error", "message"),
    [
        ("x", lambda x: x[0], ValueError, r"x must be of shape \[B, T, C\]"),
        ("x", lambda x: x.int(), TypeError, "x must be of dtype"),
        ("w_q", lambda x: x[:, 1:], ValueError, "w_q must be of x's width"),
        ("w_q", lambda x: x[1:], ValueError, "k must be of a head dim that divides w_q's rows, 63"),
        ("w_q", lambda x: x.double(), TypeError, "x must be of dtype float64, beside weights of the first"),
        ("norm_weight", lambda x: x[1:], ValueError, r"norm_weight must be of shape \[C\]"),
        ("k", lambda x: x[0], ValueError, "k must be of rank 4"),
        ("k", lambda x: x[:, 1:], ValueError, "v must be of k's shape"),
        ("v", lambda x: x.bfloat16(), TypeError, "v must be of q's dtype"),
        ("k", lambda x: x[:, :, :, 1:], ValueError, "k must be of a head dim that divides w_q's rows, 64"),
        ("w_out", lambda x: x[:, 1:], ValueError, r"w_out must be of shape \[C, H·D\] where w_q is \[H·D, C\]"),
        ("w_out", lambda x: x[1:], ValueError, r"w_out must be of shape \[C, H·D\] where w_q is \[H·D, C\]"),
        ("w_out", lambda x: x.bfloat16(), TypeError, "w_out must be of w_q's dtype"),
        ("gate", lambda x: x.expand(3), ValueError, r"gate must be of shape \[\], \[1\] or \[C\]"),
    ],
)
def test_errors_name_the_argument(backend, name, bad, error, message):
    case = GatedCase()
    inputs = case.inputs(backend.device)
    with pytest.raises(error, match=f"^gated_cross_attention: (?:{message})"):
        case.apply(inputs, inputs.tensors | {name: bad(inputs.tensors[name])})


def test_errors_of_intervals_and_options(backend):
    case = GatedCase()
    inputs = case.inputs(backend.device)
    with pytest.raises(TypeError, match="gated_cross_attention: intervals must be two tensors"):
        gated_cross_attention(**inputs.tensors, intervals=None)
    with pytest.raises(ValueError, match="norm must be one of layer, rms"):
        gated_cross_attention(**inputs.tensors, intervals=inputs.intervals, norm="batch")
    with pytest.raises(ValueError, match="eps must be at least 0"):
        gated_cross_attention(**inputs.tensors, intervals=inputs.intervals, eps=-1.0)
