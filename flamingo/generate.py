"""Greedy text and ranking of answers; a prompt, its media included, is read once."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from flamingo.model import Conditioning, Flamingo
from flamingo.prompt import Batch, PromptTokenizer


@dataclasses.dataclass
class Reading:
    """How far a batch has been read: all that the next token needs.

    cache: keys and values of the language model.
    attention_mask: int64 [B, tokens read].
    logits: [B, T, vocabulary] of the last tokens read.
    """

    cache: DynamicCache
    attention_mask: Tensor
    conditioning: Conditioning
    logits: Tensor

    def repeat(self, times: int) -> "Reading":
        """Each row `times` in a row, with the last logits only. The cache is expanded in place: self is used up."""
        self.cache.batch_repeat_interleave(times)
        return Reading(
            self.cache,
            self.attention_mask.repeat_interleave(times, 0),
            self.conditioning.repeat(times),
            self.logits[:, -1:].repeat_interleave(times, 0),
        )


def read(model: Flamingo, batch: Batch) -> Reading:
    """Read a batch of prompts."""
    conditioning = model.condition(batch.media, len(batch.input_ids))
    cache = DynamicCache(config=model.lm.config)
    logits = model(
        batch.input_ids, conditioning, batch.media_locations, batch.attention_mask, cache=cache, logits_to_keep=1
    )
    return Reading(cache, batch.attention_mask, conditioning.after(batch.media_locations), logits)


def read_on(model: Flamingo, reading: Reading, input_ids: Tensor, attention_mask: Tensor) -> Reading:
    """Read text [B, T] behind what was read; attention_mask [B, T] is 0 on its padding."""
    mask = torch.cat([reading.attention_mask, attention_mask], dim=1)
    no_media = torch.zeros_like(input_ids, dtype=torch.bool)
    logits = model(input_ids, reading.conditioning, no_media, mask, cache=reading.cache)
    return Reading(reading.cache, mask, reading.conditioning, logits)


@torch.no_grad()
def greedy(model: Flamingo, batch: Batch, stop_id: int, max_new_tokens: int = 20) -> list[Tensor]:
    """The likeliest next token again and again, until `stop_id`: int64 [n] per row, without it."""
    reading = read(model, batch)
    tokens = []
    running = torch.ones(len(batch.input_ids), dtype=torch.bool, device=batch.input_ids.device)
    for step in range(max_new_tokens):
        token = torch.where(running, reading.logits[:, -1].argmax(-1), stop_id)
        tokens.append(token)
        running = running & (token != stop_id)
        if not running.any() or step + 1 == max_new_tokens:
            break
        reading = read_on(model, reading, token[:, None], torch.ones_like(token[:, None]))
    return [row[: int((row != stop_id).sum())] for row in torch.stack(tokens, dim=1)]


def generate_text(model: Flamingo, tokenizer: PromptTokenizer, batch: Batch, stop: str = "\n") -> list[str]:
    """Greedy text of each row up to `stop`, a text of one token."""
    (stop_id,) = tokenizer.text_ids(stop)
    return [tokenizer.decode(ids) for ids in greedy(model, batch, stop_id)]


@torch.no_grad()
def rank(model: Flamingo, batch: Batch, answers: Sequence[Sequence[int]]) -> Tensor:
    """log p(answer | prompt) of each answer (token ids), float32 [B, answers].

    Every prompt is read once, and so is what all answers begin with.

    Raises:
        ValueError: an answer has no token.
    """
    if not all(answers):
        raise ValueError("rank: answers must each hold a token or more, got an empty one")
    rows, device = len(batch.input_ids), batch.input_ids.device
    reading = read(model, batch)
    same = [len(set(tokens)) == 1 for tokens in zip(*answers, strict=False)]
    shared = [*same[:-1], False].index(False)  # something is left of every answer
    beginning = torch.tensor(answers[0][:shared], dtype=torch.int64, device=device).repeat(rows, 1)
    logits = reading.logits
    if shared:
        reading = read_on(model, reading, beginning, torch.ones_like(beginning))
        logits = torch.cat([logits, reading.logits], dim=1)
    log_p_beginning = _log_p(logits[:, :-1], beginning).sum(1)

    longest = max(map(len, answers)) - shared
    ids = torch.zeros(len(answers), longest, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for row, answer in enumerate(answers):
        ids[row, : len(answer) - shared] = torch.tensor(answer[shared:])
        mask[row, : len(answer) - shared] = 1
    ids, mask = ids.repeat(rows, 1), mask.repeat(rows, 1)  # answers vary faster than prompts
    reading = reading.repeat(len(answers))
    logits = reading.logits
    if longest > 1:
        logits = torch.cat([logits, read_on(model, reading, ids[:, :-1], mask[:, :-1]).logits], dim=1)
    log_p_rest = (_log_p(logits, ids) * mask).sum(1).unflatten(0, (rows, len(answers)))
    return log_p_beginning[:, None] + log_p_rest


def _log_p(logits: Tensor, ids: Tensor) -> Tensor:
    """float32 [B, T]: the log-probability of each of the tokens."""
    logits = logits.float()
    return logits.gather(2, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
