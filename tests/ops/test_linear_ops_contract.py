"""norm_linear, linear_gate_residual and gated_mlp as citizens of torch: schema, autograd, compile, export, autocast."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import flamingo_kernels as fk
from flamingo_kernels.reference import gated_mlp as reference
from tests.support.linear_cases import GATES, OPS, Case, Tensors, apply, leaves_of, run_op
from tests.support.process import DTYPES, normal_process, require

pytestmark = [pytest.mark.ops(op) for op in OPS]
REGISTERED = torch.ops.flamingo_kernels
CASES = [
    Case("norm_linear", rows=(2, 5), C=8, N=6),
    Case("norm_linear", rows=(7,), C=8, N=6, norm="rms", affine=1),
    Case("norm_linear", rows=(), C=8, N=6, affine=0),
    Case("linear_gate_residual", rows=(2, 5), C=8, N=6),
    Case("linear_gate_residual", rows=(7,), C=8, N=6, gate="scalar"),
    Case("linear_gate_residual", rows=(), C=8, N=6, gate=None),
    Case("gated_mlp", rows=(2, 5), C=8, N=6),
    Case("gated_mlp", rows=(7,), C=8, N=6, norm="rms", affine=1, gate="one", activation="swiglu"),
    Case("gated_mlp", rows=(), C=8, N=6, affine=0, gate=None, activation="gelu", recompute=True),
]
ONE_OF_EACH = [Case("norm_linear"), Case("linear_gate_residual", gate="one"), Case("gated_mlp", gate="one")]


@pytest.mark.parametrize(
    "case",
    [
        case if case.rows else replace(case, dtype=torch.bfloat16, streams=torch.float32)
        for case in CASES
        if case.rows != (7,)
    ],
    ids=str,
)
def test_opcheck(backend, case):
    tensors, dy = case.inputs(backend.device)
    forward, backward = getattr(REGISTERED, case.op).default, getattr(REGISTERED, f"{case.op}_backward").default
    options = [value for name, value in case.options().items() if name != "recompute"]
    more = [*options, *([not case.recompute] if case.op == "gated_mlp" else []), backend.name]
    torch.library.opcheck(forward, (*tensors.values(), *more))
    torch.library.opcheck(forward, (*leaves_of(tensors).values(), *more))

    saved = [x for name, x in tensors.items() if name != "residual"]
    wanted = [True] * len(saved)  # also of what is not there
    if case.op == "gated_mlp":
        saved.insert(1, forward(*tensors.values(), *more)[1])
    torch.library.opcheck(backward, (dy, *saved, *options, wanted, backend.name))
    frozen = backward(dy, *saved, *options, [False] * len(wanted), backend.name)
    assert all(gradient.shape == (0,) for gradient in frozen)


@normal_process
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.fp64
def test_gradcheck(backend, case):
    tensors, _ = replace(case, dtype=torch.float64).inputs(backend.device)
    leaves = leaves_of(tensors)
    given = [name for name, x in leaves.items() if x is not None]

    def function(*args: Tensor) -> Tensor:
        return apply(case, leaves | dict(zip(given, args, strict=True)))

    assert torch.autograd.gradcheck(function, [leaves[name] for name in given])


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_no_double_backward(backend, case):
    tensors, _ = case.inputs(backend.device)
    leaves = leaves_of(tensors)
    (dx,) = torch.autograd.grad(apply(case, leaves).square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dx.sum().backward()


@pytest.mark.parametrize("case", [*ONE_OF_EACH, replace(ONE_OF_EACH[2], activation="swiglu", recompute=True)], ids=str)
def test_gradient_of_what_needs_one(backend, case):
    """With some of the inputs frozen, the others get the same gradients."""
    tensors, dy = case.inputs(backend.device)
    expected = run_op(case, tensors, dy)
    for count in (1, 2, len(tensors) - 1):
        for wanted in itertools.combinations(tensors, count):
            leaves = leaves_of(tensors, wanted)
            y = apply(case, leaves)
            assert torch.equal(y, expected["y"])
            gradients = torch.autograd.grad(y, [leaves[name] for name in wanted], dy)
            for name, gradient in zip(wanted, gradients, strict=True):
                assert torch.equal(gradient, expected[name]), (wanted, name)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_without_autograd(backend, case, mode):
    tensors, dy = case.inputs(backend.device)
    with mode():
        y = apply(case, leaves_of(tensors))
    assert not y.requires_grad
    assert torch.equal(y, run_op(case, tensors, dy)["y"])


# ---- what is saved --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [None, torch.float32], ids=["", "wide streams"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(
    "case", [*CASES, *(replace(CASES[6], gate=gate, activation="swiglu") for gate in GATES)], ids=str
)
def test_bytes_saved_for_backward(backend, case, dtype, streams):
    """The formulas of the docstrings, to the byte; what comes from outside is saved as it is, without a copy."""
    case = replace(case, dtype=dtype, streams=streams)
    tensors, _ = case.inputs(backend.device)
    leaves, saved = leaves_of(tensors), {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        apply(case, leaves)
    n, e, e_x, C, N = tensors["x"][..., 0].numel(), dtype.itemsize, (streams or dtype).itemsize, case.C, case.N
    norm = 0 if case.op == "linear_gate_residual" else e_x * C * min(case.affine, 2 if case.norm == "layer" else 1)
    gate = 0 if tensors.get("gate") is None else e_x * tensors["gate"].numel()
    if case.op == "gated_mlp":
        halves = 2 if case.activation == "swiglu" else 1
        weights, hidden = e * (halves * N * C + C * N), 0 if case.recompute else e * n * halves * N
    else:
        weights, hidden = e * N * C, 0
    assert sum(saved.values()) == e_x * n * C + norm + weights + gate + hidden
    given = {x.data_ptr() for name, x in leaves.items() if x is not None and name != "residual"}
    assert given <= saved.keys()


@pytest.fixture
def saves_hidden(monkeypatch) -> list[bool]:
    """What gated_mlp's reference is told to save, call by call."""
    told, forward = [], reference.forward

    def spy(*args: object) -> tuple[Tensor, Tensor]:
        told.append(args[-1])
        return forward(*args)

    monkeypatch.setattr(reference, "forward", spy)
    return told


@pytest.mark.parametrize("compiled", [False, True])
def test_hidden_is_saved_only_for_a_gradient(saves_hidden, compiled):
    case = Case("gated_mlp")
    tensors, _ = case.inputs("cpu")

    def run(wanted: list[str], recompute: bool = False) -> bool:
        torch._dynamo.reset()
        function = torch.compile(apply, fullgraph=True, backend="eager") if compiled else apply
        function(replace(case, recompute=recompute), leaves_of(tensors, wanted))
        return saves_hidden.pop()

    with fk.use_backend("reference"):
        assert all(run([name]) for name in tensors)
        assert not run([])
        assert not run(["x", "w_in"], recompute=True)
        with torch.no_grad():
            assert not run(["x", "w_in"])


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_backward_makes_no_gradient_of_hidden(name):
    """Autograd would fill a tensor of hidden's size with zeros for it."""
    require(name)
    case = Case("gated_mlp", rows=(64,), C=8, N=4096)
    tensors, dy = case.inputs("cpu")
    with fk.use_backend(name), torch.profiler.profile(record_shapes=True) as profile:
        apply(case, leaves_of(tensors)).backward(dy)
    filled = [event.input_shapes[0] for event in profile.events() if event.name in ("aten::zero_", "aten::fill_")]
    assert [64, 4096] not in filled


# ---- torch.compile and torch.export ---------------------------------------------------------------------------------


def _between_others(case: Case, x: Tensor, rest: Tensors) -> Tensor:
    tensors = {"x": x * 2, **rest}
    if "residual" in rest:
        tensors["residual"] = x @ rest["weight"].T
    return apply(case, tensors).tanh()


def _compare_compiled(compiled, case: Case, device: str, lengths: tuple[int, ...]) -> None:
    for i, length in enumerate(lengths):
        tensors, dy = replace(case, rows=(2, length)).inputs(device)
        dy = dy / length
        ours, theirs = leaves_of(tensors), leaves_of(tensors)
        results = []
        for function, leaves in ((compiled, ours), (_between_others, theirs)):
            x = leaves.pop("x")
            given = [x, *(t for name, t in leaves.items() if t is not None and name != "residual")]
            with torch._dynamo.config.patch(error_on_recompile=i >= 2):
                y = function(case, x, leaves)
                results.append([y, *torch.autograd.grad(y, given, dy)])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_compiles_once_for_all_lengths(backend, case):
    torch._dynamo.reset()
    compiled = torch.compile(_between_others, fullgraph=True, backend="aot_eager")
    _compare_compiled(compiled, case, backend.device, (100, 117, 200, 256, 300))


@normal_process
@pytest.mark.slow
def test_compiles_with_inductor(backend):
    torch._dynamo.reset()
    for case in ONE_OF_EACH:
        _compare_compiled(torch.compile(_between_others, fullgraph=True), case, backend.device, (100, 200, 300))


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_compiles_with_the_default_backend(case):
    """No use_backend around it: the backend is chosen by device while tracing."""
    torch._dynamo.reset()
    tensors, _ = case.inputs("cpu")
    assert torch.equal(torch.compile(apply, fullgraph=True, backend="aot_eager")(case, tensors), apply(case, tensors))


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_exports_with_any_number_of_rows(backend, case):
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            given = {name: x for name, x in tensors.items() if name not in ("x", "residual")}
            self.parameters_of_op = torch.nn.ParameterDict({name: torch.nn.Parameter(x) for name, x in given.items()})

        def forward(self, x: Tensor) -> Tensor:
            rest = {name: self.parameters_of_op[name] for name in self.parameters_of_op}
            return _between_others(case, x, rest | ({"residual": None} if "residual" in tensors else {}))

    tensors, _ = case.inputs(backend.device)
    model = Model()
    length = torch.export.Dim("length", min=4, max=4096)
    program = torch.export.export(model, (tensors["x"],), dynamic_shapes={"x": {1: length}})
    assert any(node.target is getattr(REGISTERED, case.op).default for node in program.graph.nodes)
    for exported in (program, program.run_decompositions()):
        for rows in (12, 31, 200):
            x = replace(case, rows=(2, rows)).inputs(backend.device)[0]["x"]
            torch.testing.assert_close(exported.module()(x), model(x))


# ---- autocast -------------------------------------------------------------------------------------------------------

CAST = {"norm_linear": ("weight",), "linear_gate_residual": ("x", "weight"), "gated_mlp": ("w_in", "w_out")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("streams", ["wide", "narrow"])
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_autocast(backend, case, streams, dtype):
    """The weights become the autocast dtype, the streams stay as they are, and each gradient is of its input's own."""
    tensors, dy = case.inputs(backend.device)
    if streams == "narrow":
        tensors |= {name: tensors[name].to(dtype) for name in ("x", "residual") if name in tensors}
    leaves = leaves_of(tensors)
    with torch.autocast(backend.device, dtype):
        y = apply(case, leaves)
    assert y.dtype == {"norm_linear": dtype, "gated_mlp": tensors["x"].dtype}.get(
        case.op, leaves.get("residual", y).dtype
    )
    dy = dy.to(y.dtype)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    cast = {name: x.to(dtype) if name in CAST[case.op] else x for name, x in tensors.items()}
    expected = run_op(case, cast, dy)
    assert torch.equal(y, expected["y"])
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype, name
        assert torch.equal(gradient, expected[name].to(leaf.dtype)), name


@normal_process
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
@pytest.mark.fp64
def test_autocast_leaves_fp64_alone(backend, case):
    tensors, dy = replace(case, dtype=torch.float64).inputs(backend.device)
    expected = run_op(case, tensors, dy)
    with torch.autocast(backend.device, torch.bfloat16):
        results = run_op(case, tensors, dy)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("case", "name"), [(case, name) for case in ONE_OF_EACH for name in case.inputs("cpu")[0]], ids=str
)
def test_autocast_cannot_mix_fp64_with_others(backend, case, name):
    tensors, _ = case.inputs(backend.device)
    with torch.autocast(backend.device, torch.bfloat16), pytest.raises(TypeError, match=r"must be of .*dtype"):
        apply(case, tensors | {name: tensors[name].double()})


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_autocast_switched_off_inside(backend, case):
    tensors, dy = case.inputs(backend.device)
    expected = run_op(case, tensors, dy)["y"]
    with torch.autocast(backend.device, torch.bfloat16), torch.autocast(backend.device, enabled=False):
        assert torch.equal(run_op(case, tensors, dy)["y"], expected)
        with pytest.raises(TypeError, match=r"must be of dtype float32, .* got torch\.bfloat16"):
            apply(case, tensors | {"x": tensors["x"].bfloat16()})


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_autocast_under_compile(backend, case):
    torch._dynamo.reset()
    tensors, dy = case.inputs(backend.device)

    def function(tensors: Tensors) -> Tensor:
        with torch.autocast(backend.device, torch.bfloat16):
            return apply(case, tensors)

    results = []
    for run in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        leaves = leaves_of(tensors)
        y = run(leaves)
        results.append([y, *torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))])
    torch.testing.assert_close(*results)
