"""masked_cross_attention: every number of forward and backward within the error budget, over shapes and intervals."""

import concurrent.futures
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import flamingo_kernels as fk
from tests.support.attention_cases import KINDS, Case, run_op
from tests.support.dense_attention import Results, assert_right
from tests.support.process import DTYPES, only_cpp, pick

SWEEPS = pick(
    [
        *(Case(kind=kind) for kind in KINDS),
        *(Case(T=T) for T in (1, 3, 63, 65, 127)),
        *(Case(D=D) for D in (1, 7, 33, 40, 80, 96, 128, 256)),
        *(Case(M=M, L=L) for M, L in ((0, 16), (1, 16), (33, 16), (3, 1), (3, 65), (2, 257))),
        *(Case(H=H, G=G) for H, G in ((1, 1), (4, 4), (4, 1), (8, 2), (8, 1), (6, 3), (70, 1))),
        *(Case(B=6, beams=3, T=T, H=4, G=2, kind=kind) for T in (1, 17) for kind in ("latest", "all", "random")),
        *(Case(T=1, M=33, L=64, H=4, G=4, B=3, beams=3, kind=kind) for kind in ("latest", "full")),
        *(Case(scale=scale, kind="random") for scale in (-0.3, 0.0, 1.0, 4.0)),
        *(Case(T=127, M=33, L=64, B=1, H=1, G=1, kind=kind) for kind in ("all", "random", "sliding", "one_key")),
        *(Case(T=300, M=5, L=64, B=1, kind=kind) for kind in ("latest", "random", "touching")),
        *(Case(T=9, M=80, L=64, B=1, H=4, G=1, kind=kind) for kind in ("full", "random")),  # K past 4096
    ],
    [
        *(Case(kind=kind, B=1, T=19, D=16) for kind in KINDS),
        *(Case(B=1, H=1, G=1, T=T, D=16, kind="all") for T in (1, 3, 63, 65, 127)),
        *(Case(B=1, H=1, G=1, T=5, D=D) for D in (1, 7, 33, 40, 64, 80, 96, 128, 256)),
        *(Case(B=1, H=1, G=1, T=9, D=16, M=M, L=L) for M, L in ((0, 16), (33, 1), (1, 65), (2, 257), (3, 64))),
        *(Case(B=1, H=H, G=G, T=5, D=16, kind="random") for H, G in ((4, 1), (8, 2), (6, 3))),
        *(Case(B=3, beams=3, T=T, H=4, G=2, D=16, kind="random") for T in (1, 5)),
        *(Case(B=1, T=9, D=16, scale=scale, kind="random") for scale in (-0.3, 0.0, 4.0)),
    ],
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SWEEPS, ids=str)
def test_within_the_error_budget(backend, case, dtype):
    inputs = replace(case, dtype=dtype).inputs(backend.device)
    assert_right(run_op(inputs), inputs)


def _random_case(seed: int) -> Case:
    draw = random.Random(seed)
    G = draw.choice((1, 2, 3))
    beams = draw.choice((1, 1, 2, 3))
    return Case(
        dtype=draw.choice(DTYPES),
        kind=draw.choice(KINDS),
        B=beams * draw.choice((1, 2)),
        beams=beams,
        T=draw.choice((1, 2, draw.randint(3, pick((200,), (20,))[0]))),
        H=G * draw.choice((1, 2, 4)),
        G=G,
        D=draw.choice((8, 16, 24, 32, 64, 72, draw.randint(1, 160))),
        M=draw.randint(0, pick((9,), (3,))[0]),
        L=draw.choice((1, 5, 16, 64, draw.randint(1, 90))),
        scale=draw.choice((None, None, draw.uniform(-1, 1))),
        seed=seed,
    )


@pytest.mark.parametrize("case", [_random_case(seed) for seed in range(pick((60,), (10,))[0])], ids=str)
def test_random_cases(backend, case):
    inputs = case.inputs(backend.device)
    assert_right(run_op(inputs), inputs)


@pytest.mark.parametrize("dtype", pick(DTYPES, DTYPES[:1]), ids=str)
@pytest.mark.parametrize("shape", [{}, {"B": 4, "beams": 2, "H": 4, "G": 1}], ids=["rows", "beams"])
@pytest.mark.parametrize("L", [64, 40])
def test_rows_of_every_kind_side_by_side(backend, L, shape, dtype):
    """Tokens that see one media, several, a part of one, one key or nothing, in turn, so that every tile has all kinds.

    Media of 64 keys are blocks of the kernels, media of 40 lie across their borders.
    """
    inputs = Case(dtype=dtype, T=37, M=4, L=L, D=16, **shape).inputs(backend.device)
    token = torch.arange(37, device=backend.device)
    media, kind = token // 5 % 4, token % 6
    starts = [media * L, media * L, media * L + 7, media * L + 11, media * L + L // 2, 0 * media]
    lengths = [L, 2 * L, L // 3, 1, 0, 4 * L]
    start = torch.stack(starts)[kind, token]
    end = (start + torch.tensor(lengths, device=backend.device)[kind]).clamp(max=4 * L)
    rows = inputs.q.shape[0]
    start, end = (torch.stack([x.roll(b) for b in range(rows)]).int() for x in (start, end))
    inputs = inputs._replace(start=start, end=end)
    assert_right(run_op(inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", pick((1e4, -1e4, 1e10, -1e10), (1e4, -1e4)))
def test_huge_scores_stay_finite(backend, dtype, magnitude):
    """Scores of ±1 to ±3 times the magnitude: o is a mean of v, with whatever weights."""
    inputs = Case(dtype=dtype, T=33, D=16, kind="random").inputs(backend.device)
    q = (inputs.q.sign() * 7).where(inputs.q.abs() < 1, inputs.q.sign() * 21)[..., :1].expand_as(inputs.q)
    inputs = inputs._replace(q=q, k=torch.ones_like(inputs.k), scale=magnitude / (7 * 16 + 0.1))
    results = run_op(inputs)
    visible = (inputs.start < inputs.end)[:, None].expand_as(results.lse)
    assert results.lse[visible].isfinite().all()
    fits = dtype != torch.float16 or abs(magnitude) <= 1e4  # dq and dk grow with the scale
    for name in ("o", "dv", "dq", "dk") if fits else ("o", "dv"):
        assert getattr(results, name).isfinite().all(), name
    assert results.o.abs().max() <= inputs.v.abs().max() * 1.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_dominant_key_takes_everything(backend, dtype):
    """Where one visible score is 1e4 above the others, o is that key's v, and dv is do.

    Backward recomputes p = exp(score - lse), so an error of the score, eps(fp32) of its size, is a relative one of p.
    """
    inputs = Case(dtype=dtype, T=17, D=16, H=1, G=1, B=1, kind="full").inputs(backend.device)
    k = torch.zeros_like(inputs.k)
    k[:, 29] = 1
    q = (inputs.q * 2).round().clamp(1, 3)
    inputs = inputs._replace(q=q, k=k, scale=1e4 / 7)
    results = run_op(inputs)
    winner = inputs.v[:, 29:30]
    assert ((results.o - winner).abs() <= 2 * torch.finfo(dtype).eps * winner.abs()).all()
    score = q.double().sum(-1).max().item() * inputs.scale
    relative = 2 * torch.finfo(torch.float32).eps * score + 2 * torch.finfo(dtype).eps
    assert ((results.dv[:, 29] - inputs.do.double().sum(1)).abs() <= relative * inputs.do.double().abs().sum(1)).all()
    assert (results.dv[:, :29] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_that_sees_nothing_is_exactly_zero(backend, dtype):
    inputs = Case(dtype=dtype, kind="some_empty").inputs(backend.device)
    results = run_op(inputs)
    blind = inputs.start >= inputs.end
    assert blind.any()
    assert not blind.all()
    assert (results.o[blind] == 0).all()
    assert (results.dq[blind] == 0).all()
    assert (results.lse.transpose(1, 2)[blind] == float("-inf")).all()


@pytest.mark.parametrize("kind", pick(KINDS, ("latest", "random")))
def test_key_that_nobody_sees_gets_no_gradient(backend, kind):
    inputs = Case(kind=kind, T=9, M=4).inputs(backend.device)
    inputs = inputs._replace(end=inputs.end.clamp(max=inputs.k.shape[1] - 20))
    results = run_op(inputs)
    for grad in (results.dk, results.dv):
        assert (grad[:, -20:] == 0).all()


@pytest.mark.parametrize("sizes", [{"B": 0}, {"T": 0}, {"M": 0}, {"H": 0, "G": 0}, {"B": 0, "T": 0, "M": 0}], ids=str)
def test_zero_sizes(backend, sizes):
    inputs = Case(**{"B": 2, "T": 5, "M": 2, "kind": "full", **sizes}).inputs(backend.device)
    results = run_op(inputs)
    assert results.o.shape == inputs.q.shape
    assert results.lse.shape == (inputs.q.shape[0], inputs.q.shape[2], inputs.q.shape[1])
    for grad, x in zip(results[2:], inputs[:3], strict=True):
        assert grad.shape == x.shape
    assert all((x == 0).all() for x in (results.o, *results[2:]))
    assert (results.lse == float("-inf")).all()


@pytest.mark.parametrize("nothing", [{"B": 0}, {"H": 0}], ids=str)
def test_no_queries_for_the_keys_there_are(backend, nothing):
    """Zero rows or heads of q are a multiple of any number of them in k."""
    queries = Case(**{"T": 3, "kind": "full", **nothing}).inputs(backend.device)
    keys = Case(T=3, kind="full").inputs(backend.device)
    results = run_op(queries._replace(k=keys.k, v=keys.v))
    assert results.o.shape == results.dq.shape == queries.q.shape
    for grad in (results.dk, results.dv):
        assert grad.shape == keys.k.shape
        assert (grad == 0).all()


def test_zero_head_dim(backend):
    """⟨q, k⟩ over no dimensions is 0, so lse is the log of the number of visible keys."""
    inputs = Case(D=0, scale=1.0, kind="random").inputs(backend.device)
    results = run_op(inputs)
    visible = (inputs.end - inputs.start).clamp(min=0).float().log()
    torch.testing.assert_close(results.lse, visible[:, None].expand_as(results.lse))


def test_memory_is_poisoned(poison):
    """What the tests rely on to see an element of an output that nobody wrote."""
    for dtype in DTYPES:
        assert torch.empty(1000, dtype=dtype).isnan().all()


def test_default_scale_is_one_over_the_root_of_head_dim(backend):
    inputs = Case(D=40, T=9).inputs(backend.device)
    implied = fk.masked_cross_attention(*inputs[:3], (inputs.start, inputs.end))
    assert torch.equal(implied, run_op(inputs._replace(scale=40**-0.5)).o)


def test_lse(backend):
    """The natural log, scale included: what merging two attentions over parts of the keys needs."""
    inputs = Case(T=9, D=16, kind="full").inputs(backend.device)
    o, lse = run_op(inputs)[:2]
    half = inputs.k.shape[1] // 2
    parts = [
        run_op(inputs._replace(start=torch.full_like(inputs.start, first), end=torch.full_like(inputs.end, last)))
        for first, last in ((0, half), (half, inputs.k.shape[1]))
    ]
    torch.testing.assert_close(torch.logaddexp(parts[0].lse, parts[1].lse), lse)
    merged = sum(part.o * (part.lse - lse).exp().transpose(1, 2)[..., None] for part in parts)
    torch.testing.assert_close(merged, o)


@pytest.mark.parametrize("kind", ["latest", "random", "full"])
def test_same_inputs_same_bits(backend, kind):
    inputs = Case(T=pick((100,), (40,))[0], D=32, H=4, G=2, B=2, beams=2, M=5, kind=kind).inputs(backend.device)
    first = run_op(inputs)
    for _ in range(pick((4,), (1,))[0]):
        assert _identical(run_op(inputs), first)


@only_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["latest", "all", "full", "random"])
@pytest.mark.parametrize("shape", [{"B": 1, "H": 2, "G": 1, "M": 12, "L": 64}, {"B": 4, "beams": 2, "M": 5}], ids=str)
def test_same_bits_for_any_number_of_threads(backend, shape, kind, dtype):
    """Also where one row has to be split up between the threads."""
    inputs = Case(dtype=dtype, T=130, D=32, kind=kind, **shape).inputs("cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run_op(inputs)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert _identical(run_op(inputs), first), threads
    finally:
        torch.set_num_threads(before)
    assert_right(first, inputs)


@only_cpp
def test_same_bits_from_many_threads_at_once(backend):
    inputs = [Case(dtype=dtype, T=65, D=32, M=5, kind="random").inputs("cpu") for dtype in DTYPES] * 4
    expected = [run_op(x) for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(_identical(*pair) for pair in zip(pool.map(run_op, inputs), expected, strict=True))


@only_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_onednn(backend, dtype):
    """torch can be told to leave oneDNN alone, whose matmuls the C++ kernels call."""
    inputs = Case(dtype=dtype, kind="random").inputs("cpu")
    with torch.backends.mkldnn.flags(enabled=False):
        assert_right(run_op(inputs), inputs)


@only_cpp
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(backend, capability):
    """ATEN_CPU_CAPABILITY takes the place of a smaller CPU, in a process of its own."""
    cases = f"{__file__}::test_random_cases"
    command = [sys.executable, "-m", "pytest", "-k", "cpu-cpu", cases]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-2000:]
    assert "passed" in process.stdout


def _identical(a: Results, b: Results) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
