"""masked_cross_attention as a citizen of torch: schema, autograd, compile, export, autocast, and what it saves."""

import pytest
import torch
from torch import Tensor

import flamingo_kernels as fk
from tests.support.attention_cases import Case, run_op
from tests.support.dense_attention import Inputs, assert_right
from tests.support.process import DTYPES, normal_process, pick

OPS = torch.ops.flamingo_kernels


def _leaves(inputs: Inputs) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in inputs[:3]]


def _intervals(inputs: Inputs) -> fk.Intervals:
    return fk.Intervals(inputs.start, inputs.end)


@pytest.mark.parametrize("dtype", pick(DTYPES, DTYPES[:1]), ids=str)
@pytest.mark.parametrize(
    "case", [Case(T=7, D=8, H=4, B=4, beams=2, kind="random"), Case(T=3, M=0, kind="empty")], ids=str
)
def test_opcheck(backend, case, dtype):
    inputs = Case(**{**vars(case), "dtype": dtype}).inputs(backend.device)
    more = (inputs.start, inputs.end, 0.3, backend.name)
    torch.library.opcheck(OPS.masked_cross_attention.default, (*inputs[:3], *more))
    torch.library.opcheck(OPS.masked_cross_attention.default, (*_leaves(inputs), *more))
    o, lse = OPS.masked_cross_attention(*inputs[:3], *more)
    saved = (inputs.start, inputs.end, o, lse, 0.3, backend.name)
    torch.library.opcheck(OPS.masked_cross_attention_backward.default, (inputs.do, *inputs[:3], *saved))


@normal_process
@pytest.mark.parametrize("kind", ["latest", "random", "some_empty", "one_key", "full"])
@pytest.mark.fp64
def test_gradcheck(backend, kind):
    inputs = Case(dtype=torch.float64, T=5, L=3, D=4, H=4, G=2, B=2, beams=2, kind=kind).inputs(backend.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fk.masked_cross_attention(q, k, v, _intervals(inputs), softmax_scale=-0.7)

    assert torch.autograd.gradcheck(attend, _leaves(inputs))


def test_no_double_backward(backend):
    inputs = Case(T=5, D=16).inputs(backend.device)
    q, k, v = _leaves(inputs)
    o = fk.masked_cross_attention(q, k, v, _intervals(inputs))
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dq.sum().backward()


def test_gradient_of_what_needs_one(backend):
    """With some of q, k and v frozen, the others get the same gradients."""
    inputs = Case(T=9, D=16, kind="random").inputs(backend.device)
    expected = run_op(inputs)[2:]
    for wanted in ([0], [1], [2], [0, 2]):
        leaves = [x.detach().clone().requires_grad_(i in wanted) for i, x in enumerate(inputs[:3])]
        o = fk.masked_cross_attention(*leaves, _intervals(inputs), softmax_scale=inputs.scale)
        gradients = torch.autograd.grad(o, [leaves[i] for i in wanted], inputs.do)
        assert all(torch.equal(x, expected[i]) for i, x in zip(wanted, gradients, strict=True))


def test_lse_is_not_differentiable(backend):
    inputs = Case(T=9, D=16).inputs(backend.device)
    o, lse = fk.masked_cross_attention(*_leaves(inputs), _intervals(inputs), return_lse=True)
    assert o.requires_grad
    assert not lse.requires_grad
    assert torch.equal(o, fk.masked_cross_attention(*inputs[:3], _intervals(inputs)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(backend, mode):
    inputs = Case(T=9, D=16).inputs(backend.device)
    expected = run_op(inputs)
    with mode():
        o, lse = fk.masked_cross_attention(*_leaves(inputs), _intervals(inputs), return_lse=True)
    assert not o.requires_grad
    assert torch.equal(o, expected.o)
    assert torch.equal(lse, expected.lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interval_dtype", [torch.int32, torch.int64])
def test_bytes_saved_for_backward(backend, dtype, interval_dtype):
    """The formula of the docstring, to the byte; q, k and v are saved as they are, without a copy."""
    B, beams, T, H, G, D, K = 4, 2, 9, 4, 2, 16, 48
    inputs = Case(dtype=dtype, B=B, beams=beams, T=T, H=H, G=G, D=D, M=3, L=16).inputs(backend.device)
    leaves = _leaves(inputs)
    saved = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o = fk.masked_cross_attention(*leaves, (inputs.start.to(interval_dtype), inputs.end.to(interval_dtype)))
    e, lse = dtype.itemsize, 8 if dtype == torch.float64 else 4
    assert sum(saved.values()) == e * (2 * B * T * H * D + 2 * (B // beams) * K * G * D) + lse * B * H * T + 8 * B * T
    assert {x.data_ptr() for x in (*leaves, o)} <= saved.keys()


# ---- torch.compile and torch.export ---------------------------------------------------------------------------------


def _attend(q: Tensor, k: Tensor, v: Tensor, locations: Tensor) -> Tensor:
    intervals = fk.media_intervals(locations, 16, 3, attend="all")
    return fk.masked_cross_attention(q * 2, k, v, intervals).tanh()


def _locations(B: int, T: int, device: str) -> Tensor:
    return torch.arange(T, device=device).expand(B, T) % (T // 2) == 1


def _assert_compiles(compiled, backend, lengths: tuple[int, ...]) -> None:
    for i, T in enumerate(lengths):
        inputs = Case(T=T, D=16, H=4, G=2, B=4, beams=2).inputs(backend.device)
        locations = _locations(4, T, backend.device)
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            leaves, eager = _leaves(inputs), _leaves(inputs)
            got = compiled(*leaves, locations)
            gradients = torch.autograd.grad(got, leaves, inputs.do)
        expected = _attend(*eager, locations)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, eager, inputs.do))


@normal_process
def test_compiles_once_for_all_lengths(backend):
    torch._dynamo.reset()
    _assert_compiles(torch.compile(_attend, fullgraph=True, backend="aot_eager"), backend, (100, 117, 200, 256, 300))


@normal_process
@pytest.mark.slow
def test_compiles_with_inductor(backend):
    torch._dynamo.reset()
    _assert_compiles(torch.compile(_attend, fullgraph=True), backend, (100, 200, 300))


@normal_process
def test_compiles_with_the_default_backend():
    """No use_backend around it: the backend is chosen by device while tracing, and lse comes along."""
    torch._dynamo.reset()
    inputs = Case(T=9, D=16).inputs("cpu")

    def attend(q: Tensor) -> tuple[Tensor, Tensor]:
        return fk.masked_cross_attention(q, *inputs[1:3], _intervals(inputs), return_lse=True)

    o, lse = torch.compile(attend, fullgraph=True, backend="aot_eager")(inputs.q)
    expected = attend(inputs.q)
    assert torch.equal(o, expected[0])
    assert torch.equal(lse, expected[1])


@normal_process
def test_compiled_code_follows_use_backend(monkeypatch):
    """A graph compiled for one backend must not serve another."""
    torch._dynamo.reset()
    inputs = Case(T=9, D=16).inputs("cpu")
    compiled = torch.compile(lambda q: fk.masked_cross_attention(q, *inputs[1:3], _intervals(inputs)), backend="eager")
    compiled(inputs.q)
    from flamingo_kernels.reference import masked_cross_attention as reference

    calls = []
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *args: calls.append(1) or forward(*args))
    with fk.use_backend("reference"):
        compiled(inputs.q)
    assert calls == [1]


@normal_process
def test_exports_with_any_number_of_tokens(backend):
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, locations: Tensor) -> Tensor:
            return _attend(q, k, v, locations)

    def arguments(T: int) -> tuple[Tensor, ...]:
        inputs = Case(T=T, D=16).inputs(backend.device)
        return (*inputs[:3], _locations(2, T, backend.device))

    tokens = torch.export.Dim("tokens", min=4, max=4096)
    dynamic = {"q": {1: tokens}, "k": None, "v": None, "locations": {1: tokens}}
    program = torch.export.export(Model(), arguments(12), dynamic_shapes=dynamic)
    assert any(node.target is OPS.masked_cross_attention.default for node in program.graph.nodes)
    for exported in (program, program.run_decompositions()):
        for T in (12, 31, 200):
            torch.testing.assert_close(exported.module()(*arguments(T)), _attend(*arguments(T)))


# ---- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_autocast(backend, dtype, mixed):
    """q, k and v become the autocast dtype, o is of it, and each gradient is of its input's own."""
    inputs = Case(T=9, D=16, H=4, G=2, kind="random").inputs(backend.device)
    leaves = _leaves(inputs)
    if mixed:
        leaves[1] = leaves[1].detach().to(torch.bfloat16).requires_grad_()
        leaves[2] = leaves[2].detach().to(torch.float16).requires_grad_()
    with torch.autocast(backend.device, dtype):
        o, lse = fk.masked_cross_attention(*leaves, _intervals(inputs), softmax_scale=inputs.scale, return_lse=True)
    assert o.dtype == dtype
    assert lse.dtype == torch.float32
    gradients = torch.autograd.grad(o, leaves, inputs.do.to(dtype))
    assert [x.dtype for x in gradients] == [x.dtype for x in leaves]
    q, k, v = (x.detach().to(dtype) for x in leaves)
    cast = inputs._replace(q=q, k=k, v=v, do=inputs.do.to(dtype))
    expected = run_op(cast)
    assert_right(expected, cast)
    assert torch.equal(o, expected.o)
    assert torch.equal(lse, expected.lse)
    for gradient, wanted, leaf in zip(gradients, expected[2:], leaves, strict=True):
        assert torch.equal(gradient, wanted.to(leaf.dtype))


@normal_process
@pytest.mark.fp64
def test_autocast_leaves_fp64_alone(backend):
    inputs = Case(dtype=torch.float64, T=9, D=16).inputs(backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        results = run_op(inputs)
    assert_right(results, inputs)


@normal_process
@pytest.mark.parametrize("which", range(3))
def test_autocast_cannot_mix_fp64_with_others(backend, which):
    inputs = Case(dtype=torch.float32, T=9, D=16).inputs(backend.device)
    qkv = list(inputs[:3])
    qkv[which] = qkv[which].double()
    with torch.autocast(backend.device, torch.bfloat16), pytest.raises(TypeError, match="q's dtype"):
        fk.masked_cross_attention(*qkv, _intervals(inputs))


def test_autocast_switched_off_inside(backend):
    inputs = Case(T=9, D=16).inputs(backend.device)
    with torch.autocast(backend.device, torch.bfloat16), torch.autocast(backend.device, enabled=False):
        assert torch.equal(run_op(inputs).o, run_op(inputs).o)
        assert run_op(inputs).o.dtype == torch.float32
        with pytest.raises(TypeError, match="k must be of q's dtype"):
            fk.masked_cross_attention(inputs.q, inputs.k.bfloat16(), inputs.v, _intervals(inputs))


@normal_process
def test_autocast_under_compile(backend):
    torch._dynamo.reset()
    inputs = Case(T=9, D=16).inputs(backend.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(backend.device, torch.bfloat16):
            return fk.masked_cross_attention(q, k, v, _intervals(inputs))

    leaves, eager = _leaves(inputs), _leaves(inputs)
    got = torch.compile(attend, fullgraph=True, backend="aot_eager")(*leaves)
    expected = attend(*eager)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)
    do = inputs.do.bfloat16()
    torch.testing.assert_close(torch.autograd.grad(got, leaves, do), torch.autograd.grad(expected, eager, do))
