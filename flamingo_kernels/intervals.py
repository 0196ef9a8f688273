"""Which keys a text token sees: one run of the key axis per token, as two int32 arrays.

In every Flamingo a text token sees whole media, and the media it sees stand next to each other on the key axis. A
dense [T, K] mask therefore carries no more than the run's two ends (docs/design.md, fact 1).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flamingo_kernels._checks import expect, expect_type, got

ATTEND = ("latest", "all", "next", "group")


class Intervals(NamedTuple):
    """Token t of row b sees the keys j with start[b, t] <= j < end[b, t]; start >= end sees nothing.

    start, end: int32 [B, T].
    """

    start: Tensor
    end: Tensor


def media_intervals(
    media_locations: Tensor,
    tokens_per_media: int,
    num_media: int | Tensor | None = None,
    *,
    attend: str = "latest",
    document_start: Tensor | None = None,
    media_seen: int | Tensor | None = None,
    validate: bool = True,
) -> Intervals:
    """The keys each text token sees, from where the media tokens stand.

    Args:
        media_locations: bool [B, T], True at each media token; that token itself counts as having seen its media.
        tokens_per_media: L, key positions per media (64 latents); media m of a row owns keys m·L to (m+1)·L.
        num_media: int or int [B], the media the row really has. None: `media_seen` plus the media tokens of the row.
        attend: which media a token sees.
            "latest": the last one at or before the token (the paper's).
            "all": every one of its document up to and including that one.
            "next": a media token sees its own media, other text the first media after it, whose token may lie in a
                later chunk but never in another document (the paper's p_next augmentation).
            "group": like latest, but adjacent media tokens form a group, and a token sees all members of the latest
                group that stand at or before it (Llama 3.2).
        document_start: bool [B, T], True where a new document starts: nothing before it is visible.
        media_seen: int or int [B], media that came before this chunk (chunked prefill, decoding, further turns). They
            belong to the chunk's first document, unless the chunk opens with `document_start`.
        validate: check that no row has more media tokens than `num_media`, which costs one device sync (left out while
            torch.compile traces). Without it, tokens whose own count exceeds `num_media` see nothing.

    Returns:
        Intervals of int32 [B, T]; (0, 0) where a token sees nothing.

    Raises:
        TypeError: media_locations or document_start is not bool, or a count is not an integer.
        ValueError: a wrong shape, an unknown `attend`, or a row with more media tokens than `num_media`.
    """
    op = "media_intervals"
    expect_type(isinstance(media_locations, Tensor), op, "media_locations", "a bool tensor", got(media_locations))
    expect_type(media_locations.dtype == torch.bool, op, "media_locations", "dtype bool", media_locations.dtype)
    expect(media_locations.ndim == 2, op, "media_locations", "shape [B, T]", list(media_locations.shape))
    expect_type(
        isinstance(tokens_per_media, int | torch.SymInt) and not isinstance(tokens_per_media, bool),
        op,
        "tokens_per_media",
        "an int",
        got(tokens_per_media),
    )
    expect(tokens_per_media >= 1, op, "tokens_per_media", "at least 1", tokens_per_media)
    expect(attend in ATTEND, op, "attend", f"one of {', '.join(ATTEND)}", repr(attend))
    if document_start is not None:
        expect_type(isinstance(document_start, Tensor), op, "document_start", "a bool tensor", got(document_start))
        expect_type(document_start.dtype == torch.bool, op, "document_start", "dtype bool", document_start.dtype)
        expect(
            document_start.shape == media_locations.shape,
            op,
            "document_start",
            f"the shape of media_locations, {list(media_locations.shape)}",
            list(document_start.shape),
        )
        expect(
            document_start.device == media_locations.device,
            op,
            "document_start",
            f"device {media_locations.device}",
            document_start.device,
        )

    is_media = media_locations.long()
    seen = _row_counts(op, "media_seen", 0 if media_seen is None else media_seen, media_locations)
    count = seen + is_media.cumsum(1)  # [B, T] media at or before the token, its own included
    reached = seen + is_media.sum(1, keepdim=True)
    total = reached if num_media is None else _row_counts(op, "num_media", num_media, media_locations)
    if validate and num_media is not None and not torch.compiler.is_compiling():
        over = (reached > total).flatten().nonzero()
        if over.numel():
            row = int(over[0])
            raise ValueError(
                f"{op}: num_media must be at least the media tokens of each row; row {row} has "
                f"{int(reached[row])} (media_seen included) and num_media {int(total.expand_as(reached)[row])}"
            )

    before = count - is_media  # media strictly before the token
    if document_start is None:
        document_first, document_stop = torch.zeros_like(count), total.expand_as(count)
    else:
        document_first = torch.where(document_start, before, 0).cummax(1).values
        document_stop = _next_value(torch.where(document_start, before, total), total)

    if attend == "next":
        first = torch.where(media_locations, count - 1, count)
        stop = first + 1
        visible = media_locations | (count < document_stop)
    else:
        stop = count
        visible = count > document_first
        if attend == "latest":
            first = count - 1
        elif attend == "all":
            first = document_first
        else:
            first = _group_first(media_locations, document_start, count, seen)
    visible = visible & (count <= total)
    start = torch.where(visible, first * tokens_per_media, 0)
    end = torch.where(visible, stop * tokens_per_media, 0)
    return Intervals(start.int(), end.int())


def _row_counts(op: str, name: str, value: int | Tensor, media_locations: Tensor) -> Tensor:
    """An int or an int [B] as int64 [B or 1, 1] on the device of media_locations."""
    if isinstance(value, Tensor):
        expect_type(
            not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool,
            op,
            name,
            "an integer dtype",
            value.dtype,
        )
        rows = media_locations.shape[0]
        expect(value.ndim == 0 or value.shape == (rows,), op, name, f"shape [] or [{rows}]", list(value.shape))
        return value.to(media_locations.device, torch.int64).reshape(-1, 1)
    expect_type(
        isinstance(value, int | torch.SymInt) and not isinstance(value, bool), op, name, "an int or int [B]", got(value)
    )
    expect(value >= 0, op, name, "at least 0", value)
    return torch.full((1, 1), value, dtype=torch.int64, device=media_locations.device)


def _next_value(at_start: Tensor, last: Tensor) -> Tensor:
    """For each t, the smallest value at positions after t; `last` [B or 1, 1] behind the final one."""
    shifted = torch.cat([at_start[:, 1:], last.expand(at_start.shape[0], 1)], dim=1)[:, : at_start.shape[1]]
    return shifted.flip(1).cummin(1).values.flip(1)


def _group_first(media_locations: Tensor, document_start: Tensor | None, count: Tensor, seen: Tensor) -> Tensor:
    """Index of the first media of the latest group at or before each token."""
    opens = media_locations.clone()
    opens[:, 1:] &= ~media_locations[:, :-1]
    if document_start is not None:
        opens |= media_locations & document_start
    carried = (seen - 1).clamp(min=0)  # a chunk that opens with text: the last media before it
    return torch.where(opens, count - 1, carried).cummax(1).values
