"""masked_cross_attention: where a NaN or an infinity goes.

In a key that nobody sees: nowhere. In one that is seen: to every token that sees it. The C++ kernels promise more: to
nobody else, not even within a tile.
"""

import pytest
import torch
from torch import Tensor

from tests.support.attention_cases import KINDS, Case, run_op
from tests.support.dense_attention import Inputs, Results, assert_right
from tests.support.process import DTYPES, only_cpp, pick

NOT_FINITE = (float("nan"), float("inf"), float("-inf"))


def _visible(inputs: Inputs) -> Tensor:
    """bool [B, T, K]."""
    key = torch.arange(inputs.k.shape[1], device=inputs.k.device)
    return (key >= inputs.start[..., None]) & (key < inputs.end[..., None])


def _with(x: Tensor, index: object, value: float) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


def _assert_identical(actual: Results, expected: Results) -> None:
    for name in Results._fields:
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@pytest.mark.parametrize("value", pick(NOT_FINITE, NOT_FINITE[:1]))
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("dtype", pick(DTYPES, DTYPES[:2]), ids=str)
@pytest.mark.parametrize("kind", pick(KINDS, ("latest", "random")))
def test_what_nobody_sees_reaches_nobody(backend, kind, dtype, where, value):
    inputs = Case(kind=kind, dtype=dtype, T=7, M=4, L=10, D=16, H=4, B=4, beams=2).inputs(backend.device)
    inputs = inputs._replace(start=inputs.start.clamp(min=3), end=inputs.end.clamp(max=37))
    hidden = ~_visible(inputs).any(1).unflatten(0, (2, 2)).any(1)  # [B', K], by any beam
    assert hidden.any()
    poisoned = _with(getattr(inputs, where), hidden, value)
    _assert_identical(run_op(inputs._replace(**{where: poisoned})), run_op(inputs))


@pytest.mark.parametrize("kind", pick(("latest", "random", "full", "sliding"), ("random",)))
@pytest.mark.parametrize("dtype", pick(DTYPES, DTYPES[:2]), ids=str)
def test_what_is_seen_propagates(backend, kind, dtype):
    inputs = Case(kind=kind, dtype=dtype, T=9, D=16, H=4, G=2, B=4, beams=2).inputs(backend.device)
    row, key, head, dim = 1, 17, 1, 5
    sees = _visible(inputs)[:, :, key]
    sees[: 2 * row] = False  # the rows that read other keys
    assert sees.any()
    heads = slice(2, 4)  # those that read key head 1

    results = run_op(inputs._replace(k=_with(inputs.k, (row, key, head, dim), float("nan"))))
    assert results.o[sees][:, heads].isnan().all()
    assert results.lse.transpose(1, 2)[sees][:, heads].isnan().all()
    assert results.dq[sees][:, heads].isnan().all()

    results = run_op(inputs._replace(v=_with(inputs.v, (row, key, head, dim), float("nan"))))
    assert results.o[sees][:, heads, dim].isnan().all()
    assert results.dq[sees][:, heads].isnan().all()


@only_cpp
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_key_reaches_only_those_who_see_it(backend, kind, dtype, where, value):
    """Tokens that do not see it, and keys that no token shares with it, are as right as ever."""
    inputs = Case(kind=kind, dtype=dtype, T=40, M=4, D=16, H=4, G=2, B=4, beams=2).inputs(backend.device)
    row, key, head = 1, 29, 1
    visible = _visible(inputs)
    reads = torch.tensor([row == b // 2 for b in range(4)])[:, None, None] & torch.tensor([False, False, True, True])
    sees = visible[:, :, key, None] & reads  # [B, T, H]
    shares = (visible & sees.any(-1)[..., None]).any(1).unflatten(0, (2, 2)).any(1)  # [B', K]
    shares = shares[..., None] & torch.tensor([False, True])  # [B', K, G]
    clean = run_op(inputs)
    bad = run_op(inputs._replace(**{where: _with(getattr(inputs, where), (row, key, head), value)}))
    if where == "v":
        assert not bad.o[sees].isfinite().any()
    assert_right(_where_not(sees, sees, shares, bad, clean), inputs)


@only_cpp
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("where", ["q", "do"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_token_reaches_only_the_keys_it_sees(backend, kind, dtype, where, value):
    """One token's q or do: the other tokens and the keys that it does not see are as right as ever."""
    inputs = Case(kind=kind, dtype=dtype, T=40, M=4, D=16, H=4, G=2, B=4, beams=2).inputs(backend.device)
    clean = run_op(inputs)
    visible = _visible(inputs)
    blind = (~visible[3].any(-1)).nonzero().flatten().tolist()[:1]
    for row, token in [(2, 21), (1, 39), *((3, t) for t in blind)]:
        bad = run_op(inputs._replace(**{where: _with(getattr(inputs, where), (row, token, 3), value)}))
        itself = torch.zeros(inputs.q.shape[:3], dtype=torch.bool)
        itself[row, token, 3] = visible[row, token].any()  # one that sees nothing stays exactly 0
        seen = torch.zeros(inputs.k.shape[:3], dtype=torch.bool)
        seen[row // 2, :, 1] = visible[row, token]
        nowhere = torch.zeros_like(itself)
        assert_right(_where_not(itself if where == "q" else nowhere, itself, seen, bad, clean), inputs)


def _where_not(tokens: Tensor, gradients: Tensor, keys: Tensor, bad: Results, clean: Results) -> Results:
    """`bad`, but `clean` where something bad may be: o and lse of tokens, dq of gradients, dk and dv of keys."""
    reached = (tokens[..., None], tokens.transpose(1, 2), gradients[..., None], keys[..., None], keys[..., None])
    return Results(*(torch.where(*each) for each in zip(reached, clean, bad, strict=True)))
