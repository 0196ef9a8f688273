"""latent_attention takes any strides: slices of a projection for all layers, expanded latents, misaligned rows."""

import pytest
import torch

from tests.support.latent_attention_cases import LatentCase, assert_identical, assert_right, attend, leaves_of, run_op
from tests.support.layouts import LAYOUTS
from tests.support.process import DTYPES, pick

pytestmark = pytest.mark.ops("latent_attention")
TENSORS = ("q", "k_media", "v_media", "k_latents", "v_latents", "do")


@pytest.mark.parametrize("dtype", pick(DTYPES[:2], DTYPES[:1]), ids=str)
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("layout", pick(list(LAYOUTS), ["head dim first", "inside of more", "expanded dim 0"]))
def test_strides(backend, layout, name, dtype):
    inputs = LatentCase(dtype=dtype, S=40, R=9, H=4, D=24).inputs(backend.device)
    inputs = inputs._replace(**{name: LAYOUTS[layout](getattr(inputs, name))})
    before = getattr(inputs, name).clone()
    results = run_op(inputs)
    assert_right(results, inputs)
    assert all(x.is_contiguous() for x in results)
    assert torch.equal(getattr(inputs, name), before)


@pytest.mark.parametrize("dtype", pick(DTYPES, DTYPES[:1]), ids=str)
def test_a_layer_of_the_resampler(backend, dtype):
    """Media k and v inside of one projection for all layers; q and latent k and v of one row, for all media."""
    N, S, R, G, D = 3, 70, 17, 2, 16
    inputs = LatentCase(dtype=dtype, N=N, S=S, R=R, H=G, G=G, D=D).inputs(backend.device)
    media = torch.randn(N, S, 3 * 2 * G * D, device=backend.device).to(dtype)
    k_media, v_media = media.unflatten(-1, (3, 2, G, D))[:, :, 1].unbind(2)
    q, k, v = torch.randn(R, 3 * G * D, device=backend.device).to(dtype).unflatten(-1, (3, G, D)).unbind(1)
    q, k, v = (x.expand(N, R, G, D) for x in (q, k, v))
    inputs = inputs._replace(q=q, k_media=k_media, v_media=v_media, k_latents=k, v_latents=v)
    results = run_op(inputs)
    assert_right(results, inputs)
    assert_identical(run_op(inputs._replace(**{name: getattr(inputs, name).contiguous() for name in TENSORS})), results)


def test_gradients_of_what_is_shared(backend):
    """One tensor of latents for all media gets the sum of their gradients."""
    inputs = LatentCase(D=16, R=5, S=20).inputs(backend.device)
    one = [x[:1].detach().requires_grad_() for x in (inputs.q, inputs.k_latents, inputs.v_latents)]
    q, k, v = (x.expand(inputs.q.shape[0], *x.shape[1:]) for x in one)
    shared = inputs._replace(q=q.detach(), k_latents=k.detach(), v_latents=v.detach())
    gradients = torch.autograd.grad(attend(inputs, q, *inputs[1:3], k, v), one, inputs.do)
    apart = run_op(shared)
    for gradient, each in zip(gradients, (apart.dq, apart.dk_latents, apart.dv_latents), strict=True):
        torch.testing.assert_close(gradient, each.sum(0, keepdim=True))


def test_one_tensor_as_everything(backend):
    """Queries, keys and values of media and latents may be the same memory."""
    inputs = LatentCase(D=16, S=12, R=12).inputs(backend.device)
    same = inputs._replace(**dict.fromkeys(TENSORS[:5], inputs.q))
    copies = same._replace(**{name: inputs.q.clone() for name in TENSORS[:5]})
    assert_identical(run_op(same), run_op(copies))
    x = inputs.q.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(attend(same, x, x, x, x, x), x, inputs.do)
    torch.testing.assert_close(gradient, sum(run_op(copies)[2:]))


@pytest.mark.parametrize("layout", [torch.Tensor.long, lambda x: x.repeat_interleave(2)[::2]], ids=["int64", "strided"])
def test_strides_and_dtype_of_the_lengths(backend, layout):
    inputs = LatentCase(D=16, S=20, R=5, N=4).inputs(backend.device)
    assert_identical(run_op(inputs._replace(media_lengths=layout(inputs.media_lengths))), run_op(inputs))


def test_one_length_for_all(backend):
    inputs = LatentCase(D=16, S=20, R=5, N=4).inputs(backend.device)
    lengths = inputs.media_lengths[:1].expand(4)
    expected = run_op(inputs._replace(media_lengths=lengths.contiguous()))
    assert_identical(run_op(inputs._replace(media_lengths=lengths)), expected)


def test_backward_takes_any_strides_of_what_was_saved(backend):
    """Hooks on saved tensors, or a compiler, may give o and lse back with other strides."""
    inputs = LatentCase(D=16, S=20, R=5).inputs(backend.device)
    leaves = leaves_of(inputs)
    expected = run_op(inputs)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: x, lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0)
    )
    with hooks:
        o = attend(inputs, *leaves)
    for got, wanted in zip(torch.autograd.grad(o, leaves, inputs.do), expected[2:], strict=True):
        assert torch.equal(got, wanted)
