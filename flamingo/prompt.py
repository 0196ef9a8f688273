"""Interleaved prompts: text with `<image>` where a picture stands, and batches of them.

`<image>` becomes one token id that stands for nothing else. It is an id the vocabulary already has; a reserved token
that the language model never met will do, because what is to be known there comes from the gated blocks. A vocabulary
that does not grow leaves the language model's embeddings and logits exactly as they were.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

IMAGE = "<image>"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Text with one `<image>` per media.

    text: what is given, for instance "<image> a handwritten seven\\n<image>".
    media: visual features, one [frames, S, V] per `<image>`, in order (`Flamingo.encode`).
    target: what is to be predicted after it; empty for generation.
    """

    text: str
    media: Sequence[Tensor] = ()
    target: str = ""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts padded on the left, so that every row's next token is predicted in the last column.

    input_ids: int64 [B, T].
    attention_mask: int64 [B, T], 0 on padding.
    media_locations: bool [B, T], True at each `<image>`.
    targets: bool [B, T], True at the tokens of a prompt's target, which are those with a loss.
    media: [B, M, frames, S, V], zeros after a row's last; None where no row has any.
    attend_next: bool [B], rows whose text sees the media after it (the paper's p_next); None: no row's does.
    """

    input_ids: Tensor
    attention_mask: Tensor
    media_locations: Tensor
    targets: Tensor
    media: Tensor | None
    attend_next: Tensor | None = None


class PromptTokenizer:
    """Prompts to token ids, with a Hugging Face tokenizer.

    image_token: the token of the vocabulary that `<image>` becomes.
    chunk_end: text of one token that ends what is said of an image, the paper's <EOC>.

    Raises:
        ValueError: the vocabulary lacks it.
    """

    def __init__(self, tokenizer, image_token: str = IMAGE, chunk_end: str = "\n") -> None:
        vocabulary = tokenizer.get_vocab()
        if image_token not in vocabulary:
            raise ValueError(f"PromptTokenizer: image_token must be in the vocabulary, got {image_token!r}")
        self.tokenizer = tokenizer
        self.image_id = vocabulary[image_token]
        self.chunk_end = chunk_end
        self.first = list(tokenizer("")["input_ids"])  # what stands before every text: <s> in some models

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text without `<image>` and without special tokens added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a prompt's text."""
        head, *pieces = text.split(IMAGE)
        ids = self.first + self.text_ids(head)
        for piece in pieces:
            ids += [self.image_id, *self.text_ids(piece)]
        return ids

    def decode(self, ids: Tensor) -> str:
        """Token ids [T] to text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def collate(prompts: Sequence[Prompt], tokenizer: PromptTokenizer) -> Batch:
    """A batch of prompts of any lengths and image counts.

    Raises:
        ValueError: a prompt's count of `<image>` is not that of its media, or a prompt has no token.
    """
    given = [tokenizer.prompt_ids(prompt.text) for prompt in prompts]
    target = [tokenizer.text_ids(prompt.target) for prompt in prompts]
    for row, (prompt, ids) in enumerate(zip(prompts, given, strict=True)):
        if not ids:
            raise ValueError(f"collate: prompts must each hold a token or more, got an empty text in row {row}")
        if ids.count(tokenizer.image_id) != len(prompt.media):
            raise ValueError(
                f"collate: prompts must have one media per {IMAGE}, got {len(prompt.media)} media for "
                f"{ids.count(tokenizer.image_id)} in row {row}"
            )
    lengths = [len(a) + len(b) for a, b in zip(given, target, strict=True)]
    shape = (len(prompts), max(lengths))
    input_ids = torch.zeros(shape, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    targets = torch.zeros(shape, dtype=torch.bool)
    for row, (a, b) in enumerate(zip(given, target, strict=True)):
        input_ids[row, shape[1] - lengths[row] :] = torch.tensor(a + b)
        attention_mask[row, shape[1] - lengths[row] :] = 1
        targets[row, shape[1] - len(b) :] = True
    media_locations = (input_ids == tokenizer.image_id) & attention_mask.bool()
    return Batch(input_ids, attention_mask, media_locations, targets, _pad_media([p.media for p in prompts]))


def _pad_media(rows: Sequence[Sequence[Tensor]]) -> Tensor | None:
    count = max(len(row) for row in rows)
    if count == 0:
        return None
    first = next(row[0] for row in rows if row)
    media = first.new_zeros(len(rows), count, *first.shape)
    for i, row in enumerate(rows):
        for j, features in enumerate(row):
            media[i, j] = features
    return media
