"""media_intervals against its specification, told token by token, on hundreds of random rows; and its chunks."""

import pytest
import torch
from torch import Tensor

import flamingo_kernels as fk
from tests.intervals.literal import visible_keys
from tests.support.process import normal_process

pytestmark = normal_process

MODES = ("latest", "all", "next", "group")


def _rows(seed: int, B: int, T: int) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    """Random media locations (dense enough to stand side by side), document starts and media seen before."""
    generator = torch.Generator().manual_seed(seed)
    locations = torch.rand(B, T, generator=generator) < torch.rand(B, 1, generator=generator)
    documents = torch.rand(B, T, generator=generator) < 0.25
    return locations, documents, torch.randint(0, 4, (B,), generator=generator), generator


def _assert_literal(intervals: fk.Intervals, locations, L, num_media, attend, documents, seen) -> None:
    B, T = locations.shape
    for x in intervals:
        assert (x.dtype, x.shape, x.device) == (torch.int32, (B, T), locations.device)
    starts, ends = intervals.start.tolist(), intervals.end.tolist()
    for b in range(B):
        expected = visible_keys(
            locations[b].tolist(),
            L,
            None if num_media is None else int(num_media[b]),
            attend,
            None if documents is None else documents[b].tolist(),
            0 if seen is None else int(seen[b]),
        )
        got = [set(range(first, last)) for first, last in zip(starts[b], ends[b], strict=True)]
        assert got == expected, f"row {b}: {locations[b].int().tolist()}, documents {documents}, seen {seen}"
        assert all((s, e) == (0, 0) for s, e in zip(starts[b], ends[b], strict=True) if s >= e)


@pytest.mark.parametrize("attend", MODES)
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("with_seen", [False, True])
@pytest.mark.parametrize("T", [1, 2, 9])
def test_literally(attend, with_documents, with_seen, T):
    B = 150
    locations, documents, seen, generator = _rows(T, B, T)
    documents = documents if with_documents else None
    seen = seen if with_seen else None
    reached = locations.sum(1) + (seen if with_seen else 0)
    exact = fk.media_intervals(locations, 3, attend=attend, document_start=documents, media_seen=seen)
    _assert_literal(exact, locations, 3, None, attend, documents, seen)

    more = reached + torch.randint(0, 3, (B,), generator=generator)
    intervals = fk.media_intervals(locations, 1, more, attend=attend, document_start=documents, media_seen=seen)
    _assert_literal(intervals, locations, 1, more, attend, documents, seen)

    fewer = torch.randint(0, 4, (B,), generator=generator)
    intervals = fk.media_intervals(
        locations, 2, fewer, attend=attend, document_start=documents, media_seen=seen, validate=False
    )
    _assert_literal(intervals, locations, 2, fewer, attend, documents, seen)


@pytest.mark.parametrize("attend", MODES)
def test_an_int_means_every_row(attend):
    locations, documents, _, _ = _rows(0, 20, 8)
    for number in (8, 11):
        each = torch.full((20,), number)
        options = {"attend": attend, "document_start": documents}
        expected = fk.media_intervals(locations, 4, each + 2, media_seen=torch.full((20,), 2), **options)
        for count in (number + 2, torch.tensor(number + 2), (each + 2).int()):
            for seen in (2, torch.tensor(2), torch.full((20,), 2, dtype=torch.uint8)):
                got = fk.media_intervals(locations, 4, count, media_seen=seen, **options)
                assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("attend", MODES)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_no_rows_or_tokens(attend, shape):
    nothing = torch.zeros(shape, dtype=torch.bool)
    for num_media in (None, 2, torch.full(shape[:1], 2)):
        for documents in (None, nothing):
            intervals = fk.media_intervals(nothing, 64, num_media, attend=attend, document_start=documents)
            for x in intervals:
                assert (x.dtype, x.shape) == (torch.int32, shape)


@pytest.mark.parametrize("attend", MODES)
def test_in_chunks_as_in_whole(attend):
    """Every cut of every row, for "group" those before a media token that follows text."""
    locations, _, _, generator = _rows(5, 120, 8)
    total = locations.sum(1) + torch.randint(0, 3, (120,), generator=generator)
    whole = fk.media_intervals(locations, 5, total, attend=attend)
    cuts = 0
    for cut in range(9):
        first, second = locations[:, :cut], locations[:, cut:]
        allowed = torch.ones(120, dtype=torch.bool)
        if attend == "group" and 0 < cut < 8:
            allowed = locations[:, cut] & ~locations[:, cut - 1]
        parts = (
            fk.media_intervals(first, 5, total, attend=attend),
            fk.media_intervals(second, 5, total, attend=attend, media_seen=first.sum(1)),
        )
        for x, before, after in zip(whole, *parts, strict=True):
            assert torch.equal(torch.cat([before, after], 1)[allowed], x[allowed])
        cuts += int(allowed.sum())
    assert cuts > 200


@pytest.mark.parametrize("attend", ["latest", "all", "group"])
def test_a_chunk_that_opens_a_document(attend):
    """A packed row, cut where a document starts, gives what the whole row gives."""
    locations, documents, _, _ = _rows(6, 120, 8)
    documents[:, 4] = True
    total = locations.sum(1)
    whole = fk.media_intervals(locations, 5, total, attend=attend, document_start=documents)
    seen = locations[:, :4].sum(1)
    after = fk.media_intervals(
        locations[:, 4:], 5, total, attend=attend, document_start=documents[:, 4:], media_seen=seen
    )
    for x, y in zip(whole, after, strict=True):
        assert torch.equal(x[:, 4:], y)


@pytest.mark.parametrize("attend", ["latest", "all"])
def test_decoding_token_by_token(attend):
    locations, _, _, _ = _rows(7, 30, 8)
    total = locations.sum(1)
    whole = fk.media_intervals(locations, 64, total, attend=attend)
    for t in range(8):
        token = fk.media_intervals(
            locations[:, t : t + 1], 64, total, attend=attend, media_seen=locations[:, :t].sum(1)
        )
        assert torch.equal(token.start[:, 0], whole.start[:, t])
        assert torch.equal(token.end[:, 0], whole.end[:, t])


@pytest.mark.parametrize("attend", MODES)
def test_inputs_stay_as_they_are_and_may_have_any_strides(attend):
    locations, documents, seen, _ = _rows(8, 12, 7)
    expected = fk.media_intervals(locations, 2, attend=attend, document_start=documents, media_seen=seen)
    strided = [x.t().contiguous().t() for x in (locations, documents)]
    before = [x.clone() for x in strided]
    got = fk.media_intervals(strided[0], 2, attend=attend, document_start=strided[1], media_seen=seen)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(strided, before, strict=True))


def test_where_mixes_two_modes():
    """What the paper does for half of its batches: torch.where on two Intervals."""
    locations, _, _, _ = _rows(9, 10, 7)
    latest, following = (fk.media_intervals(locations, 2, 9, attend=attend) for attend in ("latest", "next"))
    rows = torch.arange(10)[:, None] % 2 == 0
    mixed = fk.Intervals(*(torch.where(rows, x, y) for x, y in zip(latest, following, strict=True)))
    assert torch.equal(mixed.start[::2], latest.start[::2])
    assert torch.equal(mixed.end[1::2], following.end[1::2])


@pytest.mark.parametrize("attend", MODES)
def test_compiles_once_for_all_lengths(attend):
    compiled = torch.compile(fk.media_intervals, fullgraph=True, backend="eager", dynamic=None)
    torch._dynamo.reset()
    for i, T in enumerate((8, 13, 21, 40, 77)):
        locations, documents, seen, _ = _rows(T, 6, T)
        total = locations.sum(1) + seen + 1
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            got = compiled(locations, 16, total, attend=attend, document_start=documents, media_seen=seen)
        expected = fk.media_intervals(locations, 16, total, attend=attend, document_start=documents, media_seen=seen)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("attend", MODES)
def test_on_a_gpu_without_a_sync(attend):
    locations, documents, seen, _ = _rows(10, 12, 30)
    expected = fk.media_intervals(locations, 64, 40, attend=attend, document_start=documents, media_seen=seen)
    moved = [x.cuda() for x in (locations, documents, seen)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = fk.media_intervals(
            moved[0], 64, 40, attend=attend, document_start=moved[1], media_seen=moved[2], validate=False
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.is_cuda and torch.equal(x.cpu(), y) for x, y in zip(got, expected, strict=True))
