"""latent_attention as a citizen of torch: schema, autograd, compile, export, autocast, and what it saves."""

import pytest
import torch
from torch import Tensor

import flamingo_kernels as fk
from tests.support.latent_attention_cases import LatentCase, assert_right, attend, leaves_of, run_op
from tests.support.process import DTYPES, normal_process, pick

pytestmark = pytest.mark.ops("latent_attention")
OPS = torch.ops.flamingo_kernels


@pytest.mark.parametrize("dtype", pick(DTYPES, DTYPES[:1]), ids=str)
@pytest.mark.parametrize("case", [LatentCase(S=7, R=3, H=4, D=8), LatentCase(S=0, R=3, D=8, lengths="none")], ids=str)
def test_opcheck(backend, case, dtype):
    inputs = LatentCase(**{**vars(case), "dtype": dtype}).inputs(backend.device)
    tensors, more = inputs[:5], (inputs.media_lengths, 0.3, backend.name)
    torch.library.opcheck(OPS.latent_attention.default, (*tensors, *more))
    torch.library.opcheck(OPS.latent_attention.default, (*leaves_of(inputs), *more))
    o, lse = OPS.latent_attention(*tensors, *more)
    saved = (inputs.media_lengths, o, lse, 0.3, backend.name)
    torch.library.opcheck(OPS.latent_attention_backward.default, (inputs.do, *tensors, *saved))


@normal_process
@pytest.mark.parametrize("lengths", ["none", "ragged", "zero"])
@pytest.mark.fp64
def test_gradcheck(backend, lengths):
    inputs = LatentCase(dtype=torch.float64, S=5, R=3, latents=2, D=4, H=4, lengths=lengths, scale=-0.7)
    inputs = inputs.inputs(backend.device)
    assert torch.autograd.gradcheck(lambda *tensors: attend(inputs, *tensors), leaves_of(inputs))


def test_no_double_backward(backend):
    inputs = LatentCase(S=5, R=3, D=16).inputs(backend.device)
    leaves = leaves_of(inputs)
    (dq,) = torch.autograd.grad(attend(inputs, *leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dq.sum().backward()


def test_gradient_of_what_needs_one(backend):
    """With some of the tensors frozen, the others get the same gradients."""
    inputs = LatentCase(S=20, R=5, D=16).inputs(backend.device)
    expected = run_op(inputs)[2:]
    for wanted in ([0], [1], [2], [3], [4], [0, 4]):
        leaves = [x.detach().clone().requires_grad_(i in wanted) for i, x in enumerate(inputs[:5])]
        gradients = torch.autograd.grad(attend(inputs, *leaves), [leaves[i] for i in wanted], inputs.do)
        assert all(torch.equal(x, expected[i]) for i, x in zip(wanted, gradients, strict=True))


def test_lse_is_not_differentiable(backend):
    inputs = LatentCase(S=20, R=5, D=16).inputs(backend.device)
    o, lse = attend(inputs, *leaves_of(inputs), return_lse=True)
    assert o.requires_grad
    assert not lse.requires_grad
    assert torch.equal(o, attend(inputs))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(backend, mode):
    inputs = LatentCase(S=20, R=5, D=16).inputs(backend.device)
    expected = run_op(inputs)
    with mode():
        o, lse = attend(inputs, *leaves_of(inputs), return_lse=True)
    assert not o.requires_grad
    assert torch.equal(o, expected.o)
    assert torch.equal(lse, expected.lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [torch.int32, torch.int64, None], ids=str)
def test_bytes_saved_for_backward(backend, dtype, lengths):
    """The formula of the docstring, to the byte; inputs are saved as they are, without a copy."""
    N, S, R, latents, H, G, D = 3, 20, 5, 6, 4, 2, 16
    inputs = LatentCase(dtype=dtype, N=N, S=S, R=R, latents=latents, H=H, G=G, D=D).inputs(backend.device)
    inputs = inputs._replace(media_lengths=None if lengths is None else inputs.media_lengths.to(lengths))
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:5]]
    saved = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o = attend(inputs, *leaves)
    e, lse = dtype.itemsize, 8 if dtype == torch.float64 else 4
    expected = e * N * (2 * R * H * D + 2 * (S + latents) * G * D) + lse * N * H * R
    assert sum(saved.values()) == expected + (0 if lengths is None else 4 * N)
    assert {x.data_ptr() for x in (*leaves, o)} <= saved.keys()


# ---- torch.compile and torch.export ---------------------------------------------------------------------------------


def _layer(q: Tensor, media: Tensor, latents: Tensor, lengths: Tensor | None) -> Tensor:
    k, v = media.chunk(2, 2)
    return fk.latent_attention(q * 2, k, v, *latents.chunk(2, 2), media_lengths=lengths).tanh()


def _arguments(S: int, device: str) -> tuple[Tensor, ...]:
    inputs = LatentCase(S=S, R=8, D=16, H=2, G=2).inputs(device)
    media = torch.cat([inputs.k_media, inputs.v_media], 2)
    return inputs.q, media, torch.cat([inputs.k_latents, inputs.v_latents], 2), inputs.media_lengths


def _assert_compiles(compiled, backend, lengths: tuple[int, ...]) -> None:
    for i, S in enumerate(lengths):
        *tensors, media_lengths = _arguments(S, backend.device)
        results = []
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            for layer in (compiled, _layer):
                leaves = [x.detach().clone().requires_grad_() for x in tensors]
                o = layer(*leaves, media_lengths)
                results.append((o, *torch.autograd.grad(o.sum(), leaves)))
        torch.testing.assert_close(*results)


@normal_process
def test_compiles_once_for_all_lengths(backend):
    torch._dynamo.reset()
    _assert_compiles(torch.compile(_layer, fullgraph=True, backend="aot_eager"), backend, (100, 117, 200, 256))


@normal_process
@pytest.mark.slow
def test_compiles_with_inductor(backend):
    torch._dynamo.reset()
    _assert_compiles(torch.compile(_layer, fullgraph=True), backend, (100, 200, 300))


@normal_process
def test_compiles_with_the_default_backend():
    """No use_backend around it: the backend is chosen by device while tracing, and no lengths are given."""
    torch._dynamo.reset()
    *tensors, _ = _arguments(20, "cpu")
    compiled = torch.compile(_layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors, None), _layer(*tensors, None))


@normal_process
def test_exports_with_any_number_of_media_tokens(backend):
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, media: Tensor, latents: Tensor, lengths: Tensor) -> Tensor:
            return _layer(q, media, latents, lengths)

    dynamic = {"q": None, "media": {1: torch.export.Dim("tokens", min=4, max=4096)}, "latents": None, "lengths": None}
    program = torch.export.export(Model(), _arguments(12, backend.device), dynamic_shapes=dynamic)
    assert any(node.target is OPS.latent_attention.default for node in program.graph.nodes)
    for S in (12, 200):
        arguments = _arguments(S, backend.device)
        torch.testing.assert_close(program.module()(*arguments), _layer(*arguments))


# ---- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_autocast(backend, dtype, mixed):
    """All five tensors become the autocast dtype, o is of it, and each gradient is of its input's own."""
    inputs = LatentCase(S=20, R=5, D=16, H=4).inputs(backend.device)
    leaves = leaves_of(inputs)
    if mixed:
        leaves[1] = leaves[1].detach().to(torch.bfloat16).requires_grad_()
        leaves[4] = leaves[4].detach().to(torch.float16).requires_grad_()
    with torch.autocast(backend.device, dtype):
        o, lse = attend(inputs, *leaves, return_lse=True)
    assert o.dtype == dtype
    assert lse.dtype == torch.float32
    gradients = torch.autograd.grad(o, leaves, inputs.do.to(dtype))
    names = inputs._fields[:5]
    cast = {name: x.detach().to(dtype) for name, x in zip(names, leaves, strict=True)}
    cast = inputs._replace(**cast, do=inputs.do.to(dtype))
    expected = run_op(cast)
    assert_right(expected, cast)
    assert torch.equal(o, expected.o)
    assert torch.equal(lse, expected.lse)
    for gradient, wanted, leaf in zip(gradients, expected[2:], leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert torch.equal(gradient, wanted.to(leaf.dtype))


@normal_process
@pytest.mark.fp64
def test_autocast_leaves_fp64_alone(backend):
    inputs = LatentCase(dtype=torch.float64, S=20, R=5, D=16).inputs(backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        results = run_op(inputs)
    assert_right(results, inputs)


@normal_process
@pytest.mark.parametrize("which", [1, 4])
def test_autocast_cannot_mix_fp64_with_others(backend, which):
    inputs = LatentCase(S=20, R=5, D=16).inputs(backend.device)
    tensors = list(inputs[:5])
    tensors[which] = tensors[which].double()
    with torch.autocast(backend.device, torch.bfloat16), pytest.raises(TypeError, match="q's dtype"):
        fk.latent_attention(*tensors)
