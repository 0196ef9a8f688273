"""What PerceiverResampler promises beside its numbers."""

import copy
from types import ModuleType

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import flamingo_kernels as fk
from flamingo_kernels.reference import gated_mlp, latent_attention, linear_gate_residual, media_kv, norm_linear
from tests.nn import dense_flamingo
from tests.support.process import normal_process

pytestmark = normal_process
V, B, M, FRAMES, PATCHES, R = 24, 2, 3, 5, 4, 6


def resampler(dtype: torch.dtype = torch.float64, **options: object) -> fk.nn.PerceiverResampler:
    made = fk.nn.PerceiverResampler(V, **{"depth": 2, "heads": 2, "dim_head": 8, "num_latents": R, **options}).to(dtype)
    dense_flamingo.randomize(made)
    return made


def media(dtype: torch.dtype = torch.float64, frames: int = FRAMES) -> torch.Tensor:
    return torch.randn(B, M, frames, PATCHES, V, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("options", [{}, {"max_frames": 2, "max_media": 3}, {"max_frames": 9, "qk_norm": True}])
def test_padding_changes_nothing(options):
    """Each media comes out as if it came alone, with its valid tokens only, whatever its padding holds."""
    made = resampler(**options)
    x = media()
    counts = torch.tensor([[5, 0, 1], [2, 3, 4]])
    mask = torch.rand(x.shape[:4], generator=torch.Generator().manual_seed(1)) < 0.5
    mask[1, 2] = False
    padded = x.clone()
    padded[torch.arange(FRAMES).expand(B, M, FRAMES) >= counts[..., None]] = float("nan")
    counted = made(padded, frame_counts=counts)
    masked = made(x.masked_fill(~mask[..., None], float("inf")), token_mask=mask)
    both = made(padded.masked_fill(~mask[..., None], float("nan")), frame_counts=counts, token_mask=mask)
    for b in range(B):
        for m in range(M):
            count = int(counts[b, m])
            close = {"rtol": 0, "atol": 1e-13}
            # its place in the row is kept, for the embedding of that place
            torch.testing.assert_close(counted[b, m], made(x[b : b + 1, :, :count])[0, m], **close)
            alone = _only(made, x[b, m], mask[b, m], FRAMES, m)
            torch.testing.assert_close(masked[b, m], alone, **close)
            alone = _only(made, x[b, m], mask[b, m], count, m)
            torch.testing.assert_close(both[b, m], alone, **close)


def _only(made: fk.nn.PerceiverResampler, x: torch.Tensor, mask: torch.Tensor, frames: int, place: int) -> torch.Tensor:
    """Latents [R, V] of one media from its valid tokens alone, embeddings added beforehand."""
    bare = copy.deepcopy(made)
    bare.frame_embeddings = bare.media_embeddings = None
    tokens = x[:frames]
    if made.frame_embeddings is not None:
        tokens = tokens + dense_flamingo.frame_embeddings(made.frame_embeddings, frames, frames)[:, None]
    if made.media_embeddings is not None:
        tokens = tokens + made.media_embeddings[place]
    return bare(tokens[mask[:frames]][None, None, None])[0, 0]


def test_what_padding_holds_reaches_no_gradient():
    made = resampler(max_frames=3)
    mask = torch.rand(B, M, FRAMES, PATCHES, generator=torch.Generator().manual_seed(1)) < 0.5
    gradients = []
    for filling in (0.0, float("nan")):
        x = media().masked_fill(~mask[..., None], filling).requires_grad_()
        made.zero_grad()
        made(x, token_mask=mask).square().sum().backward()
        assert (x.grad[~mask] == 0).all()
        gradients.append([parameter.grad for parameter in made.parameters()])
    assert all(map(torch.equal, *gradients))


def test_a_media_without_a_valid_token_is_its_latents_alone():
    made = resampler(max_frames=3)
    x = media()
    alone = made(x[:1, :1, :0])[0, 0]
    out = made(x, frame_counts=torch.zeros(B, M, dtype=torch.int32))
    torch.testing.assert_close(out, alone.expand(B, M, R, V), rtol=0, atol=1e-14)
    out = made(x, token_mask=torch.zeros(B, M, FRAMES, PATCHES, dtype=torch.bool))
    torch.testing.assert_close(out, alone.expand(B, M, R, V), rtol=0, atol=1e-14)


@pytest.mark.parametrize("trained", [1, 2, 3, 8])
@pytest.mark.parametrize("frames", [1, 2, 7, 8, 9, 30])
def test_frame_embeddings_keep_their_ends(trained, frames):
    """With nothing else in x, the frames are the embeddings: the first ones, or all of them stretched."""
    made = resampler(max_frames=trained)
    given = made._frame_embeddings(frames, None)
    expected = dense_flamingo.frame_embeddings(made.frame_embeddings, frames, frames)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-14)
    assert torch.equal(given[0], made.frame_embeddings[0])
    if frames >= trained > 1:
        assert torch.equal(given[-1], made.frame_embeddings[-1])
    counts = torch.tensor([[frames, 1]])
    ragged = made._frame_embeddings(frames, counts)
    assert torch.equal(ragged[0, 0], given)
    assert torch.equal(ragged[0, 1, 0], made.frame_embeddings[0])


def test_order_of_tokens_in_a_frame_does_not_matter_but_frames_do():
    made = resampler(max_frames=FRAMES)
    x = media()
    torch.testing.assert_close(made(x.flip(3)), made(x), rtol=0, atol=1e-13)
    assert (made(x.flip(2)) - made(x)).abs().max() > 1e-3
    torch.testing.assert_close(resampler()(x.flip(2)), resampler()(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(B, 0, FRAMES, PATCHES), (0, M, FRAMES, PATCHES), (B, M, 0, PATCHES), (B, M, 1, 0)])
def test_nothing_to_do(shape):
    made = resampler(max_frames=2, max_media=4)
    x = torch.zeros(*shape, V, dtype=torch.float64, requires_grad=True)
    out = made(x, frame_counts=torch.full(shape[:2], shape[2]), token_mask=torch.ones(shape, dtype=torch.bool))
    assert out.shape == (*shape[:2], R, V)
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_state_dict():
    made = resampler(max_frames=8, max_media=4)
    layer = {
        "media_norm.weight": (V,),
        "media_norm.bias": (V,),
        "latent_norm.weight": (V,),
        "latent_norm.bias": (V,),
        "to_q.weight": (16, V),
        "to_kv.weight": (32, V),
        "to_out.weight": (V, 16),
        "ff_norm.weight": (V,),
        "ff_norm.bias": (V,),
        "w_in.weight": (4 * V, V),
        "w_out.weight": (V, 4 * V),
    }
    names = {"latents": (R, V), "frame_embeddings": (8, V), "media_embeddings": (4, V)}
    names |= {f"layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    names |= {"norm.weight": (V,), "norm.bias": (V,)}
    assert {name: tuple(value.shape) for name, value in made.state_dict().items()} == names
    other = fk.nn.PerceiverResampler(V, depth=2, heads=2, dim_head=8, num_latents=R, max_frames=8, max_media=4).double()
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(media()), made(media()))
    assert torch.equal(copy.deepcopy(made)(media()), made(media()))
    with_norms = resampler(qk_norm=True, activation="swiglu").state_dict()
    assert with_norms["layers.1.q_norm.weight"].shape == with_norms["layers.1.k_norm.weight"].shape == (8,)
    assert with_norms["layers.1.w_in.weight"].shape == (8 * V, V)


def test_paper_shape_costs_no_memory_on_meta():
    with torch.device("meta"):
        made = fk.nn.PerceiverResampler(1536, heads=16, dim_head=96, max_frames=8)
    assert all(parameter.is_meta for parameter in made.parameters())
    layer = 4 * 1536 * 1536 + 8 * 1536**2 + 6 * 1536
    assert sum(parameter.numel() for parameter in made.parameters()) == 6 * layer + (64 + 8) * 1536 + 2 * 1536


def test_from_meta_and_small_init():
    with torch.device("meta"):
        made = fk.nn.PerceiverResampler(V, depth=1, num_latents=512, max_frames=64, max_media=64)
    made = made.to_empty(device="cpu")
    for module in made.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for parameter in (made.latents, made.frame_embeddings, made.media_embeddings):
        assert 0.015 < parameter.std() < 0.025
    assert made(media(torch.float32)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    made = resampler(torch.float32, max_frames=3, qk_norm=True)
    counts = torch.tensor([[5, 0, 1], [2, 3, 4]])
    expected = made(media(torch.float32), frame_counts=counts)
    with torch.autocast("cpu", dtype):
        out = made(media(torch.float32), frame_counts=counts)
    assert 0 < (out - expected).abs().max() < 8 * torch.finfo(dtype).eps * expected.abs().max()
    out.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in made.parameters())


def test_compile_without_recompiling_over_frames():
    made = resampler(torch.float32, max_frames=3, max_media=4)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(made, fullgraph=True, backend=counter)
    for frames in (7, 8, 9):
        generator = torch.Generator().manual_seed(frames)
        x = media(torch.float32, frames).requires_grad_()
        counts = torch.randint(0, frames + 1, (B, M), generator=generator)
        mask = torch.rand(x.shape[:4], generator=generator) < 0.7
        for varying in (x, mask):
            torch._dynamo.mark_dynamic(varying, 2)
        out = compiled(x, frame_counts=counts, token_mask=mask)
        expected = made(x, frame_counts=counts, token_mask=mask)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        (grad,), (grad_expected,) = (torch.autograd.grad(y.square().sum(), x) for y in (out, expected))
        torch.testing.assert_close(grad, grad_expected, rtol=0, atol=1e-4)
    assert counter.frame_count == 1


def test_same_inputs_same_bits():
    made = resampler(torch.float32, max_frames=2)
    x = media(torch.float32)
    counts = torch.tensor([[5, 0, 1], [2, 3, 4]])
    runs = []
    for _ in range(3):
        made.zero_grad()
        out = made(x, frame_counts=counts)
        out.square().sum().backward()
        runs.append([out, *(parameter.grad for parameter in made.parameters())])
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


PARTS = ("media_norm", "latent_norm", "to_q", "to_kv", "to_out", "ff_norm", "w_in", "w_out")


@pytest.mark.parametrize("names", [*((name,) for name in PARTS), PARTS], ids=" ".join)
def test_swapped_modules_are_used(names):
    made = resampler()
    expected = made(media())
    called = []
    for name in names:
        hook = getattr(made.layers[1], name).register_forward_hook(
            lambda module, args, out, name=name: called.append(name)
        )
        torch.testing.assert_close(made(media()), expected, rtol=0, atol=1e-13)
        hook.remove()
    assert list(dict.fromkeys(called)) == list(names)
    for name in names:
        setattr(made.layers[1], name, nn.Sequential(getattr(made.layers[1], name), nn.Identity()))
    torch.testing.assert_close(made(media()), expected, rtol=0, atol=1e-13)
    for name in names:
        setattr(made.layers[1], name, nn.Sequential(getattr(made.layers[1], name), nn.Dropout(p=1.0)))
    assert (made(media()) - expected).abs().max() > 1e-3


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, tuple]]:
    """(op and direction, arguments) of every call of the reference's functions."""
    called = []

    def spy_on(op: ModuleType, direction: str) -> None:
        original = getattr(op, direction)
        name = f"{op.__name__.rpartition('.')[2]} {direction}"
        monkeypatch.setattr(op, direction, lambda *args: called.append((name, args)) or original(*args))

    for op in (norm_linear, media_kv, latent_attention, linear_gate_residual, gated_mlp):
        spy_on(op, "forward")
        spy_on(op, "backward")
    return called


def _only_calls(calls: list[tuple[str, tuple]], what: str) -> list[tuple]:
    return [args for name, args in calls if name == what]


def test_nothing_is_computed_twice(calls):
    """The media are projected once for all layers, and the first layer's latents once for all media."""
    made = resampler(depth=3)
    with fk.use_backend("reference"):
        made(media())
    ((x, weights, *_),) = _only_calls(calls, "media_kv forward")
    assert x.shape == (B * M, FRAMES * PATCHES, V)
    assert len(weights) == 3
    of_latents = [args[0].shape[0] for args in _only_calls(calls, "norm_linear forward")]
    assert of_latents == [1, 1, *[B * M] * 4]
    assert len(_only_calls(calls, "latent_attention forward")) == 3
    assert {what for what, _ in calls} == {
        f"{op} forward" for op in ("norm_linear", "media_kv", "latent_attention", "linear_gate_residual", "gated_mlp")
    }


def test_frozen_vision_costs_no_gradient(calls):
    """Neither of the media, nor, where the resampler is frozen too, of anything."""
    made = resampler()
    with fk.use_backend("reference"):
        made(media()).sum().backward()
        ((*_, wanted),) = _only_calls(calls, "media_kv backward")
        assert wanted == [False] + [True] * 6
        made(media().requires_grad_()).sum().backward()
        (*_, (*_, wanted)) = _only_calls(calls, "media_kv backward")
        assert all(wanted)
        made.requires_grad_(False)
        assert not made(media()).requires_grad
        assert not any(args[-1] for args in _only_calls(calls, "gated_mlp forward")[-2:])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"depth": -1}, "depth must be at least 0, got -1"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"dim_head": 0}, "dim_head must be at least 1, got 0"),
        ({"num_latents": 0}, "num_latents must be at least 1, got 0"),
        ({"max_frames": 0}, "max_frames must be at least 1, got 0"),
        ({"max_media": 0}, "max_media must be at least 1, got 0"),
        ({"ff_mult": 0}, "ff_mult must be .* got 0"),
        ({"activation": "tanh"}, "activation must be one of squared_relu, .* got 'tanh'"),
    ],
)
def test_construction_errors_name_the_argument(options, match):
    with pytest.raises(ValueError, match=f"PerceiverResampler: {match}"):
        fk.nn.PerceiverResampler(**{"dim": V, **options})


def test_call_errors_name_the_argument():
    made = resampler(max_media=2)
    x = media()[:, :2]
    counts = torch.ones(B, 2, dtype=torch.int64)
    mask = torch.ones(x.shape[:4], dtype=torch.bool)
    with pytest.raises(ValueError, match=r"x must be of shape \[B, M, frames, patches, 24\], got \[2, 2, 5, 4, 23\]"):
        made(x[..., 1:])
    with pytest.raises(ValueError, match=r"x must be of shape \[B, M, frames, patches, 24\], got \[2, 5, 4, 24\]"):
        made(x[0])
    with pytest.raises(ValueError, match="x must be of at most max_media = 2 media"):
        made(media())
    with pytest.raises(TypeError, match="frame_counts must be an integer tensor, got list"):
        made(x, frame_counts=[[1, 1], [1, 1]])
    with pytest.raises(TypeError, match=r"frame_counts must be of an integer dtype, got torch.float32"):
        made(x, frame_counts=counts.float())
    with pytest.raises(TypeError, match=r"frame_counts must be of an integer dtype, got torch.bool"):
        made(x, frame_counts=counts.bool())
    with pytest.raises(ValueError, match=r"frame_counts must be of shape \[B, M\], as x, got \[4\]"):
        made(x, frame_counts=counts.flatten())
    with pytest.raises(ValueError, match=r"frame_counts must be within 0\.\.5, got 1\.\.6"):
        made(x, frame_counts=torch.tensor([[1, 6], [2, 3]]))
    with pytest.raises(ValueError, match=r"frame_counts must be within 0\.\.5, got -1\.\.2"):
        made(x, frame_counts=torch.tensor([[1, -1], [2, 1]]))
    with pytest.raises(TypeError, match="token_mask must be a bool tensor, got int"):
        made(x, token_mask=1)
    with pytest.raises(TypeError, match=r"token_mask must be of dtype bool, got torch.int64"):
        made(x, token_mask=mask.long())
    with pytest.raises(ValueError, match=r"token_mask must be of shape .*, got \[2, 2, 5\]"):
        made(x, token_mask=mask[..., 0])
