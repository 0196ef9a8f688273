"""latent_attention: every number of forward and backward within the error budget, over shapes and lengths."""

import random
from dataclasses import replace

import pytest
import torch

import flamingo_kernels as fk
from tests.support.budget import assert_within_budget
from tests.support.latent_attention_cases import LENGTHS, LatentCase, assert_identical, assert_right, attend, run_op
from tests.support.process import DTYPES, only_cpp, pick

pytestmark = pytest.mark.ops("latent_attention")
SWEEPS = pick(
    [
        *(LatentCase(lengths=lengths) for lengths in LENGTHS),
        *(LatentCase(R=R) for R in (1, 3, 63, 64, 65, 127)),
        *(LatentCase(S=S, R=R) for S in (1, 33, 64, 65, 130) for R in (5, 64)),
        *(LatentCase(R=9, latents=latents) for latents in (0, 1, 65, 130)),
        *(LatentCase(S=S, R=9, latents=latents) for S, latents in ((0, 9), (0, 0), (1, 0), (0, 1))),
        *(LatentCase(D=D) for D in (1, 7, 33, 40, 64, 80, 96, 128)),
        *(LatentCase(H=H, G=G) for H, G in ((1, 1), (4, 1), (6, 3), (70, 1))),
        *(LatentCase(scale=scale) for scale in (-0.3, 0.0, 4.0)),
        *(LatentCase(N=1, S=S, R=R, H=1, G=1, D=16, lengths="full") for S, R in ((5000, 3), (1000, 64))),
    ],
    [
        *(LatentCase(lengths=lengths, S=21, R=5, D=16) for lengths in LENGTHS),
        *(LatentCase(N=2, S=S, R=R, D=16, H=1, G=1) for S, R in ((1, 3), (0, 3), (65, 17), (9, 33))),
        *(LatentCase(N=1, S=9, R=5, latents=latents, D=16) for latents in (0, 1, 40)),
        *(LatentCase(N=1, S=9, R=5, D=D, H=1, G=1) for D in (1, 7, 33, 80, 128)),
        *(LatentCase(N=1, S=9, R=5, D=16, H=H, G=G) for H, G in ((4, 1), (6, 3))),
        *(LatentCase(N=3, S=260, R=3, D=16, H=2, G=1, lengths=lengths) for lengths in ("ragged", "one", "some_zero")),
        LatentCase(N=1, S=200, R=40, D=16, H=3, G=1, latents=70, lengths="full"),
    ],
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SWEEPS, ids=str)
def test_within_the_error_budget(backend, case, dtype):
    inputs = replace(case, dtype=dtype).inputs(backend.device)
    assert_right(run_op(inputs), inputs)


def _random_case(seed: int) -> LatentCase:
    draw = random.Random(seed)
    G = draw.choice((1, 2, 3))
    return LatentCase(
        dtype=draw.choice(DTYPES),
        lengths=draw.choice(LENGTHS),
        N=draw.randint(1, 4),
        S=draw.choice((0, 1, 64, draw.randint(2, pick((200,), (40,))[0]))),
        R=draw.choice((pick((1,), (5,))[0], 64, draw.randint(2, pick((150,), (20,))[0]))),
        latents=draw.choice((None, None, draw.randint(0, pick((150,), (20,))[0]))),
        H=G * draw.choice((1, 2, 4)),
        G=G,
        D=draw.choice((8, 16, 32, 64, 72, draw.randint(1, 160))),
        scale=draw.choice((None, None, draw.uniform(-1, 1))),
        seed=seed,
    )


@pytest.mark.parametrize("case", [_random_case(seed) for seed in range(pick((25,), (6,))[0])], ids=str)
def test_random_cases(backend, case):
    inputs = case.inputs(backend.device)
    assert_right(run_op(inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_media_that_is_hidden_gets_no_gradient(backend, dtype):
    inputs = LatentCase(dtype=dtype, N=4, S=40, R=5, D=16, lengths="some_zero").inputs(backend.device)
    results = run_op(inputs)
    hidden = torch.arange(40, device=backend.device) >= inputs.media_lengths[:, None]
    for gradient in (results.dk_media, results.dv_media):
        assert (gradient[hidden] == 0).all()
        assert (gradient[~hidden] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_any_key_everything_is_exactly_zero(backend, dtype):
    inputs = LatentCase(dtype=dtype, S=9, R=5, latents=0, D=16, lengths="some_zero").inputs(backend.device)
    results = run_op(inputs)
    blind = inputs.media_lengths == 0
    assert blind.any()
    assert not blind.all()
    assert (results.o[blind] == 0).all()
    assert (results.dq[blind] == 0).all()
    assert (results.lse[blind] == float("-inf")).all()


@pytest.mark.parametrize(
    "sizes", [{"N": 0}, {"R": 0}, {"R": 0, "latents": 3}, {"H": 0, "G": 0}, {"S": 0, "latents": 0}, {"N": 0, "S": 0}]
)
def test_zero_sizes(backend, sizes):
    inputs = LatentCase(**{"S": 7, "R": 5, "D": 16, **sizes}).inputs(backend.device)
    results = run_op(inputs)
    assert results.lse.shape == (inputs.q.shape[0], inputs.q.shape[2], inputs.q.shape[1])
    for got, x in zip((results.o, *results[2:]), (inputs.q, *inputs[:5]), strict=True):
        assert got.shape == x.shape
        assert (got == 0).all()
    assert (results.lse == float("-inf")).all()


@pytest.mark.parametrize("lengths", ["none", "ragged"])
def test_zero_head_dim(backend, lengths):
    """⟨q, k⟩ over no dimensions is 0, so lse is the log of the number of visible keys."""
    inputs = LatentCase(D=0, scale=1.0, lengths=lengths).inputs(backend.device)
    joined = inputs.joined()
    expected = (joined.end - joined.start).float().log()
    results = run_op(inputs)
    torch.testing.assert_close(results.lse, expected[:, None].expand_as(results.lse))


def test_defaults(backend):
    inputs = LatentCase(D=40, lengths="full", scale=40**-0.5).inputs(backend.device)
    assert torch.equal(fk.latent_attention(*inputs[:5]), attend(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_masked_cross_attention_over_joined_keys(backend, dtype):
    """As right as on the same keys in one tensor, also where the border lies inside of a block of keys."""
    inputs = LatentCase(dtype=dtype, S=90, R=37, D=32, H=4).inputs(backend.device)
    joined = inputs.joined()
    intervals = (joined.start, joined.end)
    options = {"softmax_scale": joined.scale, "return_lse": True}
    other = fk.masked_cross_attention(*joined[:3], intervals, **options)
    with fk.use_backend("reference"):
        exact = fk.masked_cross_attention(*(x.double() for x in joined[:3]), intervals, **options)
    for name, *values in zip(("o", "lse"), attend(inputs, return_lse=True), exact, other, strict=True):
        assert_within_budget(name, values[0], values[1], [values[2]])


@pytest.mark.parametrize("lengths", ["none", "ragged"])
def test_same_inputs_same_bits(backend, lengths):
    inputs = LatentCase(D=32, H=4, S=130, R=40, lengths=lengths).inputs(backend.device)
    first = run_op(inputs)
    for _ in range(pick((4,), (1,))[0]):
        assert_identical(run_op(inputs), first)


@pytest.mark.parametrize("length", pick([0, 1, 63, 64, 65, 150, 257], [0, 65, 150]))
def test_keys_in_shares_of_any_size(backend, length):
    """Where programs or threads share the keys of a media, some of them may find nothing left to do."""
    inputs = LatentCase(N=2, S=257, R=3, latents=2, D=16, H=1, G=1).inputs(backend.device)
    lengths = torch.tensor([length, 257], dtype=torch.int32, device=backend.device)
    inputs = inputs._replace(media_lengths=lengths)
    assert_right(run_op(inputs), inputs)


@only_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [{"N": 1, "S": 2048, "R": 64}, {"N": 1, "S": 700, "R": 3}, {"N": 5, "S": 200}], ids=str
)
def test_same_bits_for_any_number_of_threads(backend, sizes, dtype):
    """Also where one media has to be split up between the threads."""
    inputs = LatentCase(dtype=dtype, D=32, G=1, **sizes).inputs("cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run_op(inputs)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert_identical(run_op(inputs), first)
    finally:
        torch.set_num_threads(before)
    assert_right(first, inputs)
