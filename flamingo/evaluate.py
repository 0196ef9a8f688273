"""Accuracy on prompts with one right answer: of the text the model writes, and of the answer it finds likeliest."""

import dataclasses
from collections.abc import Sequence

import torch
import tqdm

from flamingo.generate import generate_text, rank
from flamingo.model import Flamingo
from flamingo.prompt import Prompt, PromptTokenizer, collate


@dataclasses.dataclass
class Evaluation:
    """greedy, ranking: fractions of prompts answered rightly; texts: what the model wrote."""

    greedy: float
    ranking: float
    texts: list[str]


def evaluate(
    model: Flamingo,
    tokenizer: PromptTokenizer,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    labels: torch.Tensor,
    batch_size: int = 32,
) -> Evaluation:
    """Score prompts whose right answers are answers[labels].

    Greedy text is right when it equals the answer, outer spaces apart; nothing tells the model what the answers are.
    Ranking takes the answer of the greatest log-likelihood, its closing newline included.

    Args:
        labels: int64 [prompts].
    """
    model.eval()
    candidates = [tokenizer.text_ids(f" {answer}\n") for answer in answers]
    texts, chosen = [], []
    for start in tqdm.trange(0, len(prompts), batch_size, desc="evaluating", unit="batch"):
        batch = collate(prompts[start : start + batch_size], tokenizer)
        texts += [text.strip() for text in generate_text(model, tokenizer, batch)]
        chosen.append(rank(model, batch, candidates).argmax(1))
    right = [text == answers[label] for text, label in zip(texts, labels.tolist(), strict=True)]
    return Evaluation(sum(right) / len(right), (torch.cat(chosen) == labels).float().mean().item(), texts)
