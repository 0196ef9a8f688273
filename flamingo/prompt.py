"""Interleaved prompts: text with `<image>` where a picture or a video stands, and batches of them.

`<image>` becomes one token that the vocabulary already has and that stands for nothing else, so that embeddings and
logits of the language model stay as they are. A reserved one that it never met will do: what is to be known there comes
from the gated blocks. `<|endofchunk|>`, where the text of an image ends, likewise becomes what there is.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IMAGE = "<image>"
CHUNK_END = "<|endofchunk|>"
# the paper's prompts (its appendix B.1.5); what follows "{answer}" ends an answer
CAPTION = "<image>Output: {answer}<|endofchunk|>"
QUESTION = "<image>Question: {question} Answer: {answer}<|endofchunk|>"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Text with one `<image>` per media.

    text: what is given, for instance "<image> a handwritten seven\\n<image>".
    media: one per `<image>`, in order: visual features [frames, S, V] (`Flamingo.encode`), or images where the batch
        is encoded later.
    target: what is to be predicted after it, `<image>` itself apart; empty for generation.
    attend_next: the text sees the media after it (the paper's p_next).
    """

    text: str
    media: Sequence[Tensor] = ()
    target: str = ""
    attend_next: bool = False


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt in tokens: input_ids [T] and targets [T], True at those with a loss; the rest as in `Prompt`."""

    input_ids: Sequence[int]
    targets: Sequence[bool]
    media: Sequence[Tensor] = ()
    attend_next: bool = False


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens. Padded on the left, every row's next token is predicted in the last column.

    input_ids: int64 [B, T].
    attention_mask: int64 [B, T], 0 on padding.
    media_locations: bool [B, T], True at each `<image>`.
    targets: bool [B, T], True at the tokens with a loss.
    media: [B, M, frames, S, V], or images [B, M, frames, channels, height, width]; zeros after a row's last and after a
        media's last frame; None where no row has any.
    attend_next: bool [B], rows with `Prompt.attend_next`; None: no row.
    frame_counts: int64 [B, M], the frames of each media; None where there is one frame or no media.
    document_start: bool [B, T], where each document of a row begins; None: every row is one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    media_locations: Tensor
    targets: Tensor
    media: Tensor | None
    attend_next: Tensor | None = None
    frame_counts: Tensor | None = None
    document_start: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: None if value is None else value.to(device) for name, value in fields.items()})


class PromptTokenizer:
    """Prompts to token ids, with a Hugging Face tokenizer.

    image_token: the token of the vocabulary that `<image>` becomes.
    chunk_end: what `<|endofchunk|>` becomes. None: that itself if the vocabulary has it, else the tokenizer's end of
        sequence, else a newline. It should be something the language model knows: a token that it never wrote has a
        low logit, which no gated block can raise alone.

    Raises:
        ValueError: the vocabulary lacks image_token.
    """

    def __init__(self, tokenizer, image_token: str = IMAGE, chunk_end: str | None = None) -> None:
        vocabulary = tokenizer.get_vocab()
        if image_token not in vocabulary:
            raise ValueError(f"PromptTokenizer: image_token must be in the vocabulary, got {image_token!r}")
        if chunk_end is None:
            chunk_end = CHUNK_END if CHUNK_END in vocabulary else tokenizer.eos_token or "\n"
        self.tokenizer, self.chunk_end = tokenizer, chunk_end
        self.image_id = vocabulary[image_token]
        self.first = list(tokenizer("")["input_ids"])  # what stands before every text: <s> in some models

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text without `<image>` and without special tokens added."""
        text = text.replace(CHUNK_END, self.chunk_end)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def inner_ids(self, text: str) -> list[int]:
        """Ids of a text with `<image>` that does not begin a prompt."""
        head, *pieces = text.split(IMAGE)
        ids = self.text_ids(head)
        for piece in pieces:
            ids += [self.image_id, *self.text_ids(piece)]
        return ids

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a prompt's text."""
        return self.first + self.inner_ids(text)

    def encode(self, prompt: Prompt, *, begins: bool = True) -> Example:
        """A prompt in tokens; its first token is no target, because nothing predicts it. `begins` as in `collate`."""
        given = self.prompt_ids(prompt.text) if begins else self.inner_ids(prompt.text)
        wanted = self.inner_ids(prompt.target)
        targets = [False] * len(given) + [token != self.image_id for token in wanted]
        return Example(given + wanted, [False, *targets[1:]], prompt.media, prompt.attend_next)

    def decode(self, ids: Tensor) -> str:
        """Token ids [T] to text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@dataclasses.dataclass(frozen=True)
class Shot:
    """One question about media (or a caption, where the question is empty), with its answer."""

    media: Sequence[Tensor]
    answer: str = ""
    question: str = ""


def few_shot(
    support: Sequence[Shot], query: Shot, template: str = CAPTION, *, text_only: bool = False, target: bool = False
) -> Prompt:
    """Solved examples and then the query, which is left open where its answer would stand.

    Args:
        support: in the order of the prompt; the last one is nearest to the query.
        template: a shot's text, with `{answer}` and maybe `{question}`; one `<image>` for each of its media.
        text_only: leave out the support's media. For zero shots the paper gives two such examples, which tell the form
            of an answer.
        target: whether the query's answer and what ends it are the prompt's target, for training.

    The blanks before `{answer}` go with the answer, because many tokenizers join them to its first word.

    Raises:
        ValueError: the template has no `{answer}`, or several.
    """
    if template.count("{answer}") != 1:
        raise ValueError(f"few_shot: template must hold {{answer}} once, got {template!r}")
    head, end = template.split("{answer}")
    asked = head.rstrip()
    blank = head[len(asked) :]
    of_shot = asked.replace(IMAGE, "") if text_only else asked
    shots = [of_shot.replace("{question}", shot.question) + blank + shot.answer + end for shot in support]
    media = [item for shot in support for item in shot.media if not text_only]
    return Prompt(
        "".join(shots) + asked.replace("{question}", query.question),
        [*media, *query.media],
        blank + query.answer + end if target else "",
    )


def collate(
    rows: Sequence[Prompt | Example | Sequence[Prompt | Example]],
    tokenizer: PromptTokenizer,
    *,
    padding: str = "left",
    begins: bool = True,
) -> Batch:
    """A batch of prompts of any lengths and image counts. Several in one row are documents apart from each other.

    Args:
        padding: "left" or "right".
        begins: whether prompts begin a text, with what the tokenizer puts first; False for a further turn.

    Raises:
        ValueError: a prompt's count of `<image>` is not that of its media, or a prompt has no token.
    """
    if padding not in ("left", "right"):
        raise ValueError(f"collate: padding must be left or right, got {padding!r}")
    packed = [_documents(row, number, tokenizer, begins) for number, row in enumerate(rows)]

    def column(of: Callable[[Example], Sequence]) -> Tensor:
        """[B, T] of a value for each token."""
        values = [torch.tensor([value for document in row for value in of(document)]) for row in packed]
        return pad_sequence(values, batch_first=True, padding_side=padding)

    input_ids = column(lambda document: document.input_ids)
    targets = column(lambda document: document.targets)
    attention_mask = column(lambda document: [1] * len(document.input_ids))
    document_start = column(lambda document: [True] + [False] * (len(document.input_ids) - 1))
    attend_next = torch.tensor([row[0].attend_next for row in packed])
    media, frame_counts = _pad_media([[item for document in row for item in document.media] for row in packed])
    return Batch(
        input_ids,
        attention_mask,
        (input_ids == tokenizer.image_id) & attention_mask.bool(),
        targets,
        media,
        attend_next if attend_next.any() else None,
        frame_counts,
        document_start if max(map(len, packed)) > 1 else None,
    )


def pack(prompts: Iterable[Prompt | Example], tokenizer: PromptTokenizer, length: int) -> list[list[Example]]:
    """Rows of at most so many tokens for `collate`, each prompt in the first row with room for it (first fit).

    Raises:
        ValueError: a prompt is longer than that.
    """
    rows: list[list[Example]] = []
    for prompt in prompts:
        example = tokenizer.encode(prompt) if isinstance(prompt, Prompt) else prompt
        if len(example.input_ids) > length:
            raise ValueError(f"pack: prompts must be of at most {length} tokens, got {len(example.input_ids)}")
        for row in rows:
            used = sum(len(other.input_ids) for other in row)
            if used + len(example.input_ids) <= length and row[0].attend_next == example.attend_next:
                row.append(example)
                break
        else:
            rows.append([example])
    return rows


def _documents(
    row: Prompt | Example | Sequence[Prompt | Example], number: int, tokenizer: PromptTokenizer, begins: bool
) -> list[Example]:
    items = [row] if isinstance(row, Prompt | Example) else row
    documents = [tokenizer.encode(item, begins=begins) if isinstance(item, Prompt) else item for item in items]
    for document in documents:
        if not document.input_ids:
            raise ValueError(f"collate: prompts must each hold a token or more, got an empty text in row {number}")
        count = list(document.input_ids).count(tokenizer.image_id)
        if count != len(document.media):
            got = f"{len(document.media)} media for {count} in row {number}"
            raise ValueError(f"collate: prompts must have one media per {IMAGE}, got {got}")
        if document.attend_next != documents[0].attend_next:
            raise ValueError(f"collate: prompts of one row must agree on attend_next, got both in row {number}")
    return documents


def _pad_media(rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor | None, Tensor | None]:
    """Media [B, M, frames, ...] and, where one has several frames, frame counts [B, M]."""
    items = [item for row in rows for item in row]
    if not items:
        return None, None
    shapes = {tuple(item.shape[1:]) for item in items}
    if len(shapes) > 1:
        raise ValueError(f"collate: prompts must have media of one shape but for their frames, got {sorted(shapes)}")
    lengths = [torch.tensor([len(item) for item in row], dtype=torch.int64) for row in rows]
    counts = pad_sequence(lengths, batch_first=True)
    frames = pad_sequence(items, batch_first=True)
    media = frames.new_zeros(*counts.shape, *frames.shape[1:])
    media[counts > 0] = frames
    return media, counts if frames.shape[1] > 1 else None
