"""What GatedCrossAttentionBlock promises beside its numbers."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import flamingo_kernels as fk
from flamingo_kernels.nn.gated_cross_attention import project_media
from tests.nn import dense_flamingo
from tests.support.calls import Calls
from tests.support.process import DTYPES, normal_process

pytestmark = normal_process
C, V, M, L, T, B = 24, 20, 3, 4, 13, 4
LLAMA = {"norm": "rms", "qk_norm": True, "activation": "swiglu", "kv_heads": 2, "skip_mlp_without_media": True}


def block(dtype: torch.dtype = torch.float64, **options: object) -> fk.nn.GatedCrossAttentionBlock:
    """One whose branches do something."""
    made = fk.nn.GatedCrossAttentionBlock(C, V, heads=4, dim_head=8, **options).to(dtype)
    dense_flamingo.randomize(made)
    return made


def inputs(dtype: torch.dtype = torch.float64, rows: int = B) -> tuple[torch.Tensor, torch.Tensor, fk.Intervals]:
    """x [B, T, C], media [rows, M, L, V]; the first two tokens of each row see nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, C, generator=generator).to(dtype)
    media = torch.randn(rows, M, L, V, generator=generator).to(dtype)
    locations = torch.zeros(B, T, dtype=torch.bool)
    locations[:, [2, 5, 9]] = True
    return x, media, fk.media_intervals(locations, L, M)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, LLAMA, {"gate": "vector", "activation": "gelu"}])
def test_a_fresh_block_is_the_identity(options, dtype):
    made = fk.nn.GatedCrossAttentionBlock(C, V, **{"heads": 4, **options}).to(dtype)
    x, media, intervals = inputs(dtype)
    assert torch.equal(made(x, media, intervals), x)
    assert torch.equal(made(x), x)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_at_the_start_only_the_gates_learn(gate):
    made = fk.nn.GatedCrossAttentionBlock(C, V, gate=gate).double()
    x, media, intervals = inputs()
    out = made(x, media, intervals)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype))
    for name, parameter in made.named_parameters():
        if name in ("attn_gate", "ff_gate"):
            assert parameter.shape == ((1,) if gate == "scalar" else (C,))
            assert (parameter.grad != 0).all(), name
        else:
            assert (parameter.grad == 0).all(), name


@pytest.mark.parametrize("options", [{}, LLAMA])
def test_projected_media_give_the_same_as_media(options):
    made = block(**options)
    x, media, intervals = inputs()
    k, v = made.project_media(media)
    assert k.shape == v.shape == (B, M * L, options.get("kv_heads", 4), 8)
    expected = made(x, media, intervals)
    assert torch.equal(made(x, intervals=intervals, kv=(k, v)), expected)
    assert torch.equal(made(x, media.flatten(1, 2), intervals), expected)


def test_a_step_with_projected_media_leaves_the_media_alone(backend):
    """Decoding does the work of its tokens and no more: with k and v at hand nothing of the media is computed again."""
    made = block(torch.float32).to(backend.device)
    x, media, intervals = inputs(torch.float32)
    kv = made.project_media(media.to(backend.device))
    x, intervals = x[:, -1:].to(backend.device), fk.Intervals(*(end[:, -1:].to(backend.device) for end in intervals))
    expected = made(x, intervals=intervals, kv=kv)
    nn.init.constant_(made.to_kv.weight, float("nan"))
    with torch.no_grad(), Calls() as calls:
        out = made(x, intervals=intervals, kv=kv)
    assert torch.equal(out, expected)
    assert [name for name in calls.names if name != "view"] == ["gated_block"]


def test_media_are_projected_for_all_blocks_at_once():
    """Each block gets what it gives itself, forward and backward; one that is not like the others projects alone."""
    blocks = [block(), block(qk_norm=True), block(), block(kv_heads=2), block()]
    blocks[2].to_kv = nn.Sequential(blocks[2].to_kv, nn.Identity())
    for i, made in enumerate(blocks):
        dense_flamingo.randomize(made, seed=i)
    leaves = [inputs()[1].requires_grad_(), *(next(made.to_kv.parameters()) for made in blocks)]

    def run(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        flat = [x for pair in pairs for x in pair]
        generator = torch.Generator().manual_seed(3)
        gradients = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in flat]
        return [*flat, *torch.autograd.grad(flat, leaves, gradients)]

    with Calls() as calls:
        together = run(project_media(blocks, leaves[0]))
    ((_, weights, *_),) = calls.args("media_kv")
    assert len(weights) == 3
    assert len(calls.args("media_kv_backward")) == 1
    for actual, alone in zip(together, run([made.project_media(leaves[0]) for made in blocks]), strict=True):
        atol = 64 * torch.finfo(torch.float64).eps * alone.abs().max().item()  # the slack of the error budget
        torch.testing.assert_close(actual, alone, rtol=0, atol=atol)


def test_beams_share_keys():
    made = block()
    x, media, intervals = inputs(rows=B // 2)
    repeated = made(x, media.repeat_interleave(2, 0), intervals)
    torch.testing.assert_close(made(x, media, intervals), repeated, rtol=0, atol=1e-14)
    torch.testing.assert_close(made(x, None, intervals, kv=made.project_media(media)), repeated, rtol=0, atol=1e-14)


def test_tokens_in_chunks_give_the_same_as_at_once():
    made = block()
    x, media, intervals = inputs()
    kv = made.project_media(media)
    pieces = [
        made(x[:, at], None, fk.Intervals(intervals.start[:, at], intervals.end[:, at]), kv=kv)
        for at in (slice(0, 6), slice(6, 12), slice(12, 13))
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), made(x, media, intervals), rtol=0, atol=1e-13)


@pytest.mark.parametrize("skip", [False, True])
def test_tokens_that_see_nothing(skip):
    """Their attention adds nothing; their feed-forward runs unless it is to be skipped, as in Llama 3.2."""
    made = block(skip_mlp_without_media=skip)
    x, media, intervals = inputs()
    blind = intervals.start >= intervals.end
    assert blind.sum() == 2 * B
    out = made(x, media, intervals)
    alone = made(x)
    assert torch.equal(alone, x) == skip
    torch.testing.assert_close(out[blind], alone[blind], rtol=0, atol=1e-14)
    assert ((out[~blind] - alone[~blind]).abs().amax(-1) > 1e-3).all()
    no_media = made(x, media[:, :0], fk.Intervals(*torch.zeros(2, B, T, dtype=torch.int32)))
    torch.testing.assert_close(no_media, alone, rtol=0, atol=1e-14)


def test_skipped_tokens_give_the_parameters_no_gradient():
    made = block(skip_mlp_without_media=True)
    x, media, intervals = inputs()
    made(x, media, intervals)[:, :2].sum().backward()
    assert all((parameter.grad == 0).all() for parameter in made.parameters())


@pytest.mark.parametrize("rows", [0, B])
def test_nothing_to_do(rows):
    made = block()
    x, media, intervals = inputs()
    out = made(x[:rows, :0], media[:rows], fk.Intervals(intervals.start[:rows, :0], intervals.end[:rows, :0]))
    assert out.shape == (rows, 0, C)


def test_state_dict():
    names = {
        "attn_norm.weight": (C,),
        "attn_norm.bias": (C,),
        "to_q.weight": (32, C),
        "to_kv.weight": (64, V),
        "to_out.weight": (C, 32),
        "attn_gate": (1,),
        "ff_norm.weight": (C,),
        "ff_norm.bias": (C,),
        "w_in.weight": (4 * C, C),
        "w_out.weight": (C, 4 * C),
        "ff_gate": (1,),
    }
    made = block()
    assert {name: tuple(value.shape) for name, value in made.state_dict().items()} == names
    llama = block(**LLAMA, ff_dim=40)
    shapes = {name: tuple(value.shape) for name, value in llama.state_dict().items()}
    del names["attn_norm.bias"], names["ff_norm.bias"]
    assert shapes == names | {
        "to_kv.weight": (32, V),
        "q_norm.weight": (8,),
        "k_norm.weight": (8,),
        "w_in.weight": (80, C),
        "w_out.weight": (C, 40),
    }
    other = fk.nn.GatedCrossAttentionBlock(C, V, heads=4, dim_head=8).double()
    other.load_state_dict(made.state_dict())
    x, media, intervals = inputs()
    expected = made(x, media, intervals)
    assert torch.equal(other(x, media, intervals), expected)
    assert torch.equal(copy.deepcopy(made)(x, media, intervals), expected)


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        # per block: 2 H·D·C + 2 H·D·V + 2·4·C² + 4 C of the norms + 2 gates
        ({"dim": 2048, "heads": 16}, 2 * 2048 * 2048 + 2 * 2048 * 1536 + 8 * 2048**2 + 4 * 2048 + 2),
        ({"dim": 4096, "heads": 32}, 2 * 4096 * 4096 + 2 * 4096 * 1536 + 8 * 4096**2 + 4 * 4096 + 2),
        ({"dim": 8192, "heads": 64}, 2 * 8192 * 8192 + 2 * 8192 * 1536 + 8 * 8192**2 + 4 * 8192 + 2),
    ],
    ids=["flamingo3b", "flamingo9b", "flamingo80b"],
)
def test_paper_shapes_cost_no_memory_on_meta(options, parameters):
    with torch.device("meta"):
        made = fk.nn.GatedCrossAttentionBlock(**options, dim_visual=1536, dim_head=128)
    assert all(parameter.is_meta for parameter in made.parameters())
    assert sum(parameter.numel() for parameter in made.parameters()) == parameters
    if options["dim"] == 2048:  # 24 of them: the paper's table 1 says 1.2B
        assert round(24 * parameters / 1e9, 1) == 1.2


def test_from_meta():
    with torch.device("meta"):
        made = fk.nn.GatedCrossAttentionBlock(C, V)
    made = made.to_empty(device="cpu")
    for module in made.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x, media, intervals = inputs(torch.float32)
    assert torch.equal(made(x, media, intervals), x)
    assert all(parameter.isfinite().all() for parameter in made.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, LLAMA])
def test_autocast(options, dtype):
    """The matmuls run in the autocast dtype; the residual stream and the gradients stay fp32."""
    made = block(torch.float32, **options)
    x, media, intervals = inputs(torch.float32)
    expected = made(x, media, intervals)
    with torch.autocast("cpu", dtype):
        assert made.project_media(media)[1].dtype == dtype
        out = made(x, media, intervals)
        cached = made(x, None, intervals, kv=made.project_media(media))
    assert out.dtype == torch.float32
    assert torch.equal(out, cached)
    eps = torch.finfo(dtype).eps
    assert 0 < (out - expected).abs().max() < 4 * eps * expected.abs().max()
    out.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in made.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, LLAMA])
def test_fp32_block_in_a_narrow_language_model_under_autocast(options, dtype):
    """The frozen language model is bf16, what is trained is fp32: the stream between its layers stays bf16."""
    made = block(torch.float32, **options)
    x, media, intervals = inputs(dtype)
    expected = made(x.float(), media.float(), intervals)
    with torch.autocast("cpu", dtype):
        out = made(x, media, intervals)
        assert made(x).dtype == dtype
    assert out.dtype == dtype
    assert (out - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()
    out.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in made.parameters())


@pytest.mark.parametrize("options", [{}, LLAMA])
def test_compile_without_recompiling_over_lengths(options):
    made = block(torch.float32, **options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(made, fullgraph=True, backend=counter)
    for length in (100, 101, 200, 300):
        generator = torch.Generator().manual_seed(length)
        x = torch.randn(2, length, C, generator=generator, requires_grad=True)
        media = torch.randn(2, M, L, V, generator=generator)
        intervals = fk.media_intervals(torch.rand(2, length, generator=generator) < 2 / length, L, 100)
        intervals = fk.Intervals(intervals.start.clamp(max=M * L), intervals.end.clamp(max=M * L))
        for varying in (x, *intervals):
            torch._dynamo.mark_dynamic(varying, 1)
        out = compiled(x, media, intervals)
        expected = made(x, media, intervals)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        (grad,), (grad_expected,) = (torch.autograd.grad(y.square().sum(), x) for y in (out, expected))
        torch.testing.assert_close(grad, grad_expected, rtol=0, atol=1e-4)
    assert counter.frame_count == 1


PARTS = ("attn_norm", "to_q", "to_kv", "to_out", "ff_norm", "w_in", "w_out")


@pytest.mark.parametrize("options", [{}, LLAMA])
@pytest.mark.parametrize("names", [*((name,) for name in PARTS), PARTS], ids=" ".join)
def test_swapped_modules_are_used(names, options):
    """Adapters and quantisers put their own modules where the linears stand; others are hooked on to them."""
    made = block(**options)
    x, media, intervals = inputs()
    expected = made(x, media, intervals)
    called = []
    for name in names:
        hook = getattr(made, name).register_forward_hook(lambda module, args, out, name=name: called.append(name))
        torch.testing.assert_close(made(x, media, intervals), expected, rtol=0, atol=1e-13)
        hook.remove()
    assert called == list(names)
    for name in names:
        setattr(made, name, nn.Sequential(getattr(made, name), nn.Identity()))
    torch.testing.assert_close(made(x, media, intervals), expected, rtol=0, atol=1e-13)
    for name in names:
        setattr(made, name, nn.Sequential(getattr(made, name), nn.Dropout(p=1.0)))
    assert (made(x, media, intervals) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, LLAMA])
def test_a_narrow_stream_stays_narrow_with_swapped_modules(options):
    made = block(torch.float32, **options)
    for name in ("to_out", "w_in", "w_out"):
        setattr(made, name, nn.Sequential(getattr(made, name)))
    x, media, intervals = inputs(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x, media, intervals).dtype == torch.bfloat16


def test_linear_with_a_bias():
    made = block()
    x, media, intervals = inputs()
    expected = made(x, media, intervals)
    for name in ("to_q", "to_kv", "to_out", "w_in", "w_out"):
        weight = getattr(made, name).weight
        setattr(made, name, nn.Linear(weight.shape[1], weight.shape[0]).double())
        nn.init.zeros_(getattr(made, name).bias)
        getattr(made, name).weight = weight
    torch.testing.assert_close(made(x, media, intervals), expected, rtol=0, atol=1e-13)
    nn.init.ones_(made.to_out.bias)
    assert (made(x, media, intervals) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"heads": 4, "kv_heads": 3}, "kv_heads must be a divisor of heads, 4, got 3"),
        ({"kv_heads": 0}, "kv_heads must be at least 1, got 0"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"dim_head": 0}, "dim_head must be at least 1, got 0"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"dim_visual": -1}, "dim_visual must be at least 1, got -1"),
        ({"ff_dim": 0}, "ff_dim must be at least 1, got 0"),
        ({"ff_mult": 0}, "ff_mult must be .* got 0"),
        ({"activation": "tanh"}, "activation must be one of squared_relu, .* got 'tanh'"),
        ({"norm": "batch"}, "norm must be one of layer, rms, got 'batch'"),
        ({"gate": "tensor"}, "gate must be one of scalar, vector, got 'tensor'"),
    ],
)
def test_construction_errors_name_the_argument(options, match):
    with pytest.raises(ValueError, match=f"GatedCrossAttentionBlock: {match}"):
        fk.nn.GatedCrossAttentionBlock(**{"dim": C, "dim_visual": V, **options})


def test_call_errors_name_the_argument():
    made = block()
    x, media, intervals = inputs()
    kv = made.project_media(media)
    with pytest.raises(ValueError, match="kv must be None where media is given"):
        made(x, media, intervals, kv=kv)
    with pytest.raises(ValueError, match="intervals must be given"):
        made(x, media)
    with pytest.raises(ValueError, match="intervals must be given"):
        made(x, kv=kv)
    with pytest.raises(ValueError, match=r"x must be of shape \[B, T, 24\], got \[4, 13, 23\]"):
        made(x[..., 1:], media, intervals)
    with pytest.raises(ValueError, match=r"x must be of shape \[B, T, 24\], got \[13, 24\]"):
        made(x[0], media, intervals)
    with pytest.raises(ValueError, match=r"media must be of width 20, got \[4, 3, 4, 19\]"):
        made(x, media[..., 1:], intervals)
    with pytest.raises(ValueError, match=r"media must be of shape \[B, M, L, V\] or \[B, K, V\], got \[12, 20\]"):
        made(x, media[0].flatten(0, 1), intervals)
    with pytest.raises(TypeError, match="kv must be two tensors"):
        made(x, None, intervals, kv=kv[0])
    with pytest.raises(ValueError, match="number of rows that divides"):
        made(x, media[:3], intervals)
    with pytest.raises(ValueError, match="intervals"):
        made(x, media[:, :2], intervals)  # the intervals reach past the keys
