"""media_kv as a citizen of torch: views, schema, autograd, compile, export, autocast, and what it saves."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flamingo_kernels as fk
from tests.support.media_kv_cases import EPS, MediaCase, apply, assert_identical, assert_right, run_op, saved_bytes
from tests.support.process import DTYPES, Backend, normal_process

pytestmark = pytest.mark.ops("media_kv")
OPS = torch.ops.flamingo_kernels


def _as_returned(dout: list[Tensor], backend: Backend) -> list[Tensor]:
    """Gradients of each layer as those of what the op returns: keys and values apart on the CPU, else one tensor."""
    return [half for d in dout for half in d.chunk(2, -1)] if backend.name == "cpu" else [torch.cat(dout, -1)]


def test_layout_of_keys_and_values(backend):
    inputs = MediaCase(dims=(8, 16), G=3).inputs(backend.device)
    pairs = fk.media_kv(inputs.media, inputs.weights, 3, norms=inputs.norms)
    assert [[tuple(x.shape) for x in pair] for pair in pairs] == [[(2, 33, 3, 8)] * 2, [(2, 33, 3, 16)] * 2]
    storages = len({x.untyped_storage().data_ptr() for pair in pairs for x in pair})
    k, v = pairs[1]
    if backend.name == "cpu":
        assert storages == 4
        assert all(x.is_contiguous() for pair in pairs for x in pair)
    else:  # columns of one tensor
        assert storages == 1
        assert k.storage_offset() == 48
        assert v.storage_offset() == 96
        assert k.stride() == v.stride() == (33 * 144, 144, 16, 1)


def test_default_eps(backend):
    inputs = MediaCase().inputs(backend.device)
    inputs = inputs._replace(media=inputs.media * 1e-3)
    default = fk.media_kv(inputs.media, tuple(inputs.weights), 2, norms=tuple(inputs.norms))
    given = fk.media_kv(inputs.media, inputs.weights, 2, norms=[list(norm) for norm in inputs.norms], eps=1e-5)
    other = fk.media_kv(inputs.media, inputs.weights, 2, norms=inputs.norms, eps=1e-2)
    assert torch.equal(default[0][0], given[0][0])
    assert not torch.equal(default[0][0], other[0][0])


@pytest.mark.parametrize("norms", [None, []])
def test_no_layers(backend, norms):
    assert fk.media_kv(MediaCase().inputs(backend.device).media, [], 2, norms=norms) == []


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("norms", [True, False])
def test_opcheck(backend, norms, dtype):
    inputs = MediaCase(dtype=dtype, rows=(3,), V=8, dims=(4, 2), norms=norms).inputs(backend.device)
    for each in (inputs, inputs.leaves()):
        scales, biases = [x for x, _ in each.norms or ()], [x for _, x in each.norms or ()]
        arguments = (each.media, each.weights, scales, biases, EPS)
        torch.library.opcheck(OPS.media_kv.default, (*arguments, backend.name))
    for wanted in (True, False):
        flags = [wanted] * len(each.named())
        detached = (inputs.media, inputs.weights, *([x.detach() for x in xs] for xs in (scales, biases)), EPS)
        dout = _as_returned(inputs.dout, backend)
        torch.library.opcheck(OPS.media_kv_backward.default, (dout, *detached, flags, backend.name))


@normal_process
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.fp64
def test_gradcheck(backend, norms):
    inputs = MediaCase(dtype=torch.float64, rows=(2, 2), V=4, dims=(1, 1), norms=norms).inputs(backend.device).leaves()

    def of(*tensors: Tensor) -> list[Tensor]:
        values = iter(tensors)
        return apply(inputs.map(lambda _: next(values)))

    in_order = []
    inputs.map(in_order.append)
    assert torch.autograd.gradcheck(of, in_order)


def test_no_double_backward(backend):
    inputs = MediaCase().inputs(backend.device).leaves()
    (d_media,) = torch.autograd.grad(apply(inputs)[0].square().sum(), inputs.media, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        d_media.sum().backward()


def test_gradients_of_some_of_the_keys_and_values(backend):
    """What nobody reads counts as zero."""
    inputs = MediaCase().inputs(backend.device)
    inputs.dout[0].zero_()
    inputs.dout[1][..., 32:].zero_()  # the values
    inputs.dout[2][..., :32].zero_()  # the keys
    expected = run_op(inputs)
    leaves = inputs.leaves()
    pairs = fk.media_kv(leaves.media, leaves.weights, 2, norms=leaves.norms, eps=EPS)
    read = [pairs[1][0], pairs[2][1]]
    given = [inputs.dout[1][..., :32].unflatten(-1, (2, 16)), inputs.dout[2][..., 32:].unflatten(-1, (2, 16))]
    named = leaves.named()
    for name, got in zip(named, torch.autograd.grad(read, list(named.values()), given), strict=True):
        assert torch.equal(got, expected[name]), name


class _Calls(TorchDispatchMode):
    """Counts the elements that ops with outputs of their own write."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.written[func.name()] = self.written.get(func.name(), 0) + result.numel()
        return result


def test_gradients_of_keys_and_values_are_concatenated_once_at_most(backend):
    """Backward writes no tensor of the size of all keys and values on the CPU, elsewhere one; what the op itself makes
    is apart."""
    inputs = MediaCase(rows=(40,), V=3, dims=(16, 16, 16)).inputs(backend.device)
    leaves = inputs.leaves()
    pairs = fk.media_kv(leaves.media, leaves.weights, 2, norms=leaves.norms)
    gradients = [torch.ones_like(x) for pair in pairs for x in pair]
    with _Calls() as calls:
        torch.autograd.backward([x for pair in pairs for x in pair], gradients)
    everything = sum(x.numel() for pair in pairs for x in pair)
    expected = {} if backend.name == "cpu" else {"aten::cat": everything}
    assert {name: n for name, n in calls.written.items() if n >= everything // 6} == expected


def test_nothing_is_computed_for_frozen_inputs(backend):
    """The gradients that are wanted are the same; backward is told which, and gives the others as None."""
    inputs = MediaCase().inputs(backend.device)
    expected = run_op(inputs)
    names = list(inputs.named())
    for wanted in (["media"], ["weights[1]"], ["norms[0].weight", "norms[2].bias"], names[1:], names[:4]):
        leaves = inputs.map(lambda x: x.detach().clone())
        for name in wanted:
            leaves.named()[name].requires_grad_()
        torch.autograd.backward(apply(leaves), inputs.dout)
        for name, x in leaves.named().items():
            assert (x.grad is not None) == (name in wanted), name
            assert x.grad is None or torch.equal(x.grad, expected[name]), name


def test_gradients_that_are_not_wanted_are_empty(backend):
    inputs = MediaCase().inputs(backend.device)
    scales, biases = zip(*inputs.norms, strict=True)
    arguments = (_as_returned(inputs.dout, backend), inputs.media, inputs.weights, list(scales), list(biases), EPS)
    for which in range(10):
        flags = [i == which for i in range(10)]
        d_media, *lists = OPS.media_kv_backward(*arguments, flags, backend.name)
        shapes = [x.shape for x in (d_media, *(x for each in lists for x in each))]
        given = (inputs.media, *inputs.weights, *scales, *biases)
        assert shapes == [x.shape if flag else (0,) for x, flag in zip(given, flags, strict=True)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(backend, mode):
    inputs = MediaCase().inputs(backend.device)
    expected = apply(inputs)
    with mode():
        got = apply(inputs.leaves())
    assert not any(x.requires_grad for x in got)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norms", [True, False])
def test_bytes_saved_for_backward(backend, norms, dtype):
    """The formula of the docstring, to the byte; inputs are saved as they are, without a copy."""
    case = MediaCase(dtype=dtype, norms=norms, streams=torch.float32 if dtype.itemsize == 2 else None)
    leaves = case.inputs(backend.device).map(lambda x: x.clone().requires_grad_())
    saved = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fk.media_kv(leaves.media, leaves.weights, 2, norms=leaves.norms)
    assert sum(saved.values()) == saved_bytes(case)
    assert saved.keys() == {x.data_ptr() for x in leaves.named().values()}


# ---- torch.compile and torch.export ---------------------------------------------------------------------------------


class _Model(torch.nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        inputs = MediaCase(rows=(2, 12)).inputs(device)
        self.weights = torch.nn.ParameterList(inputs.weights)
        self.scales = torch.nn.ParameterList(x for x, _ in inputs.norms)
        self.biases = torch.nn.ParameterList(x for _, x in inputs.norms)

    def forward(self, media: Tensor) -> Tensor:
        norms = list(zip(self.scales, self.biases, strict=True))
        pairs = fk.media_kv(media * 2, list(self.weights), 2, norms=norms)
        return sum(k * v for k, v in pairs).tanh()


def _media(tokens: int, device: str) -> Tensor:
    return MediaCase(rows=(2, tokens)).inputs(device).media


def _assert_compiles(compiled, model: _Model, backend, lengths: tuple[int, ...]) -> None:
    for i, tokens in enumerate(lengths):
        media = _media(tokens, backend.device)
        results = []
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            for function in (compiled, model):
                leaf = media.clone().requires_grad_()
                out = function(leaf)
                results.append((out, *torch.autograd.grad(out.mean(), [leaf, *model.parameters()])))
        torch.testing.assert_close(*results)


@normal_process
def test_compiles_once_for_all_lengths(backend):
    torch._dynamo.reset()
    model = _Model(backend.device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    _assert_compiles(compiled, model, backend, (100, 117, 200, 256))


@normal_process
@pytest.mark.slow
def test_compiles_with_inductor(backend):
    torch._dynamo.reset()
    model = _Model(backend.device)
    _assert_compiles(torch.compile(model, fullgraph=True), model, backend, (100, 200, 300))


@normal_process
def test_exports_with_any_number_of_tokens(backend):
    model = _Model(backend.device)
    dynamic = {"media": {1: torch.export.Dim("tokens", min=2, max=4096)}}
    program = torch.export.export(model, (_media(12, backend.device),), dynamic_shapes=dynamic)
    assert any(node.target is OPS.media_kv.default for node in program.graph.nodes)
    for tokens in (12, 200):
        media = _media(tokens, backend.device)
        torch.testing.assert_close(program.module()(media), model(media))


# ---- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norms", [True, False])
def test_autocast(backend, norms, dtype):
    """Media and weights become the autocast dtype, norms stay; each gradient is of its input's own dtype."""
    inputs = MediaCase(norms=norms).inputs(backend.device)
    inputs = inputs._replace(dout=[x.to(dtype) for x in inputs.dout])
    leaves = inputs.leaves()
    with torch.autocast(backend.device, dtype):
        out = apply(leaves)
    assert all(x.dtype == dtype for x in out)
    named = leaves.named()
    gradients = torch.autograd.grad(out, list(named.values()), inputs.dout)
    cast = inputs._replace(media=inputs.media.to(dtype), weights=[x.to(dtype) for x in inputs.weights])
    expected = run_op(cast)
    assert_right(expected, cast)
    for (name, leaf), got in zip(named.items(), gradients, strict=True):
        assert torch.equal(got, expected[name].to(leaf.dtype)), name


@normal_process
@pytest.mark.fp64
def test_autocast_leaves_fp64_alone(backend):
    inputs = MediaCase(dtype=torch.float64).inputs(backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        assert_identical(run_op(inputs), run_op(inputs))
        assert_right(run_op(inputs), inputs)
