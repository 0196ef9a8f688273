"""What a text token sees, told one token at a time: the sentences of docs/design.md, section 3, as loops over a row."""

from collections.abc import Sequence


def visible_keys(
    locations: Sequence[bool],
    tokens_per_media: int,
    num_media: int | None,
    attend: str,
    document_start: Sequence[bool] | None,
    media_seen: int,
) -> list[set[int]]:
    """The set of key positions that each token of one row sees."""
    starts = document_start or [False] * len(locations)
    document_of_token = [sum(starts[: t + 1]) for t in range(len(locations))]
    # every media: (where its token stands, its document); those before the chunk belong to the chunk's first document,
    # and document 0 is over already if the chunk opens with a document start
    media = [(-1, 0)] * media_seen
    media += [(t, document_of_token[t]) for t, is_media in enumerate(locations) if is_media]
    total = len(media) if num_media is None else num_media
    last_document = document_of_token[-1] if locations else 0
    media += [(len(locations), last_document)] * (total - len(media))  # their tokens lie in later chunks

    seen = []
    for t, is_media in enumerate(locations):
        document = document_of_token[t]
        at_or_before = [m for m, (position, _) in enumerate(media) if position <= t]
        mine = [m for m in at_or_before if media[m][1] == document]
        if attend == "all":
            chosen = mine
        elif attend == "latest":
            chosen = mine[-1:]
        elif attend == "group":
            chosen = [m for m in mine if _same_group(locations, starts, media[m][0], media[mine[-1]][0])]
            if media_seen and mine and mine[-1] < media_seen:
                chosen = mine[-1:]  # which media before the chunk stood side by side is not known
        elif is_media:
            chosen = [at_or_before[-1]]
        else:
            chosen = [m for m, (position, of) in enumerate(media) if position > t and of == document][:1]
        if len(at_or_before) > total:
            chosen = []
        seen.append({m * tokens_per_media + i for m in chosen if m < total for i in range(tokens_per_media)})
    return seen


def _same_group(locations: Sequence[bool], starts: Sequence[bool], first: int, last: int) -> bool:
    """Whether the media tokens at first <= last stand in one document with media tokens alone between them."""
    return first >= 0 and all(locations[first : last + 1]) and not any(starts[first + 1 : last + 1])
