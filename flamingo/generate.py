"""Text, and ranking of answers. A prompt is read once whatever is asked of it, and its media are projected once."""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig

from flamingo.language import call_names
from flamingo.model import Conditioning, Flamingo
from flamingo.prompt import Batch, PromptTokenizer


@dataclasses.dataclass
class Reading:
    """How far a batch has been read: all but its last token, whose logits belong to what comes next.

    input_ids, attention_mask, media_locations: [B, T] of all the text, the last token included.
    cache, conditioning: keys and values of T - 1 tokens; the media, and how many of them stand in those tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    media_locations: Tensor
    cache: DynamicCache
    conditioning: Conditioning

    def repeat(self, times: int) -> "Reading":
        """A copy with each row `times` in a row, for instance for many queries behind one prefix; they share media."""
        texts = [
            text.repeat_interleave(times, 0) for text in (self.input_ids, self.attention_mask, self.media_locations)
        ]
        return Reading(*texts, _repeated(copy.deepcopy(self.cache), times), self.conditioning.repeat(times))


@torch.no_grad()
def read(model: Flamingo, batch: Batch, after: Reading | None = None, *, chunk: int | None = None) -> Reading:
    """Read a batch of prompts.

    Args:
        after: what was read before, which this goes on with: a further turn, with or without new media. It is used up.
        chunk: tokens read at once; None: all. Less memory, and the same result.

    Raises:
        ValueError: a row ends with padding, or rows are packed, or are not as many as before; or there is padding in a
            further turn, and the LM knows no position ids but counts what lies between two tokens (MPT): read its rows
            one by one then.
    """
    ids, mask, locations = batch.input_ids, batch.attention_mask, batch.media_locations
    if not mask[:, -1].all() or batch.document_start is not None:
        raise ValueError("read: batch must be padded on the left and hold one document a row")
    condition = functools.partial(model.condition, batch.media, len(ids), frame_counts=batch.frame_counts)
    if after is None:
        conditioning, cache, begin = condition(), DynamicCache(config=model.lm.config), 0
    else:
        if len(ids) != len(after.input_ids):
            raise ValueError(f"read: batch must have {len(after.input_ids)} rows, as what was read, got {len(ids)}")
        if "position_ids" not in call_names(model.lm) and not mask.all():
            raise ValueError("read: batch must have no padding behind what was read, for an LM without position ids")
        there = after.conditioning.after(after.media_locations[:, -1:])  # the last token's media is there, if unread
        conditioning = dataclasses.replace(condition(after=there), media_seen=after.conditioning.media_seen)
        cache, begin = after.cache, after.input_ids.shape[1] - 1
        ids = torch.cat([after.input_ids, ids], dim=1)
        mask = torch.cat([after.attention_mask, mask], dim=1)
        locations = torch.cat([after.media_locations, locations], dim=1)
    last = ids.shape[1] - 1
    for start in range(begin, last, chunk or max(1, last - begin)):
        part = slice(start, min(last, start + (chunk or last)))
        here = locations[:, part]
        model(ids[:, part], conditioning, here, mask[:, : part.stop], cache=cache, logits_to_keep=1)
        conditioning = conditioning.after(here)
    return Reading(ids, mask, locations, cache, conditioning)


@torch.no_grad()
def generate(
    model: Flamingo, prompt: Batch | Reading, stop_ids: Sequence[int] = (), max_new_tokens: int = 20, **options: Any
) -> list[Tensor]:
    """Continue each row, by Hugging Face's `generate`.

    Args:
        prompt: what to continue. A Reading is left as it is, so that it may be read on.
        stop_ids: a row ends before the first of these.
        options: of `generate`: do_sample, temperature, top_p, num_beams, num_return_sequences, suppress_tokens, ...;
            without any it is greedy, whatever defaults the language model comes with. Beams share the keys and values
            of their media.

    Returns:
        int64 [n] for each row, or for each of its num_return_sequences.
    """
    reading = read(model, prompt) if isinstance(prompt, Batch) else prompt
    times = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    cache = _repeated(reading.cache if isinstance(prompt, Batch) else copy.deepcopy(reading.cache), times)
    defaults = {"do_sample": False, "num_beams": 1, "eos_token_id": list(stop_ids) or None, "use_cache": True}
    of_lm, model.lm.generation_config = model.lm.generation_config, GenerationConfig()
    try:
        with model.reads(reading.conditioning, reading.media_locations[:, -1:]):
            rows = model.lm.generate(
                input_ids=reading.input_ids,
                attention_mask=reading.attention_mask,
                pad_token_id=stop_ids[0] if stop_ids else 0,
                max_new_tokens=max_new_tokens,
                **{call_names(model.lm)["cache"]: cache},
                **defaults | options,
            )
    finally:
        model.lm.generation_config = of_lm
    stop = torch.tensor(list(stop_ids), dtype=rows.dtype, device=rows.device)
    rows = rows[:, reading.input_ids.shape[1] :]
    lengths = (torch.isin(rows, stop).cumsum(1) == 0).sum(1).tolist()
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def generate_text(
    model: Flamingo, tokenizer: PromptTokenizer, prompt: Batch | Reading, stop: str = "\n", **options: Any
) -> list[str]:
    """Text of each row up to `stop`, a text of one token; `options` are those of `generate`."""
    (stop_id,) = tokenizer.text_ids(stop)
    options = {"suppress_tokens": [tokenizer.image_id]} | options
    return [tokenizer.decode(ids) for ids in generate(model, prompt, [stop_id], **options)]


@torch.no_grad()
def rank(model: Flamingo, batch: Batch, answers: Sequence[Sequence[int]], *, after: Reading | None = None) -> Tensor:
    """log p(answer | prompt) of each answer (token ids), float32 [B, answers].

    Every prompt is read once, and so is what all answers begin with.

    Args:
        after: what stands before the batch and was read already; it is used up (`Reading.repeat` copies).

    Raises:
        ValueError: an answer has no token.
    """
    if not all(answers):
        raise ValueError("rank: answers must each hold a token or more, got an empty one")
    rows, device = len(batch.input_ids), batch.input_ids.device
    reading = read(model, batch, after)
    same = [len(set(tokens)) == 1 for tokens in zip(*answers, strict=False)]
    shared = [*same[:-1], False].index(False)  # something is left of every answer
    beginning = torch.tensor(answers[0][:shared], dtype=torch.int64, device=device).repeat(rows, 1)
    ids = torch.cat([reading.input_ids[:, -1:], beginning], dim=1)
    mask = torch.cat([reading.attention_mask, torch.ones_like(beginning)], dim=1)
    here = F.pad(reading.media_locations[:, -1:], (0, shared))
    logits = model(ids, reading.conditioning, here, mask, cache=reading.cache)
    log_p_beginning = _log_p(logits[:, :-1], beginning).sum(1)

    times, rest = len(answers), [torch.tensor(answer[shared:], device=device) for answer in answers]
    ids = pad_sequence(rest, batch_first=True).repeat(rows, 1)  # answers vary faster than prompts
    wanted = pad_sequence([torch.ones_like(one) for one in rest], batch_first=True).repeat(rows, 1)
    logits = logits[:, -1:].repeat_interleave(times, 0)
    if ids.shape[1] > 1:
        _repeated(reading.cache, times)
        conditioning = reading.conditioning.after(here).repeat(times)
        mask = torch.cat([mask.repeat_interleave(times, 0), wanted[:, :-1]], dim=1)
        none = torch.zeros_like(ids[:, :-1], dtype=torch.bool)
        logits = torch.cat([logits, model(ids[:, :-1], conditioning, none, mask, cache=reading.cache)], dim=1)
    log_p_rest = (_log_p(logits, ids) * wanted).sum(1).unflatten(0, (rows, times))
    return log_p_beginning[:, None] + log_p_rest


def _repeated(cache: DynamicCache, times: int) -> DynamicCache:
    """The cache itself, with each row `times` in a row."""
    if times > 1 and cache.get_seq_length():  # an empty one has no rows yet
        cache.batch_repeat_interleave(times)
    return cache


def _log_p(logits: Tensor, ids: Tensor) -> Tensor:
    """float32 [B, T]: the log-probability of each of the tokens."""
    logits = logits.float()
    return logits.gather(2, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
