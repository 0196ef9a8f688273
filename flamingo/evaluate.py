"""Few-shot evaluation: how good answers are over the number of solved examples in the prompt.

Examples are drawn at random for each query, or are those most like it (RICES: retrieval in-context example selection,
the most similar one last). Answers are written by the model, and scored by exact match, VQA accuracy or CIDEr; or they
are the likeliest of given candidates, where log-likelihoods may be averaged over several orders of the examples.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
import tqdm
from torch import Tensor

from flamingo.data import expand, frames_of, read_shard
from flamingo.generate import generate_text, rank
from flamingo.model import Flamingo
from flamingo.prompt import CAPTION, Batch, PromptTokenizer, Shot, collate, few_shot

SHOTS = (0, 1, 2, 4, 8, 16, 32)
SELECTIONS = ("random", "rices")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked.

    support, queries: solved examples to draw from, and what is to be answered; media are images [frames, channels,
        height, width].
    references: of each query all answers that count as right.
    template: a shot's text, as of `few_shot`.
    metric: "exact" | "vqa" | "cider"; a closed task is "exact".
    candidates: of a closed task, all answers that there are.

    Raises:
        ValueError: an unknown metric, other counts of references than of queries, or a closed task that is not "exact".
    """

    support: Sequence[Shot]
    queries: Sequence[Shot]
    references: Sequence[Sequence[str]]
    template: str = CAPTION
    metric: str = "exact"
    candidates: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.metric not in METRICS or (self.candidates and self.metric != "exact"):
            known = "exact where there are candidates" if self.candidates else f"one of {', '.join(METRICS)}"
            raise ValueError(f"Task: metric must be {known}, got {self.metric!r}")
        if len(self.queries) != len(self.references):
            raise ValueError(f"Task: references must be {len(self.queries)} like queries, got {len(self.references)}")


@dataclasses.dataclass(frozen=True)
class Score:
    """shots; score: the mean over queries; low, high: its 95 % confidence interval; answers: what was answered."""

    shots: int
    score: float
    low: float
    high: float
    answers: list[str]


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the answer is a reference, outer spaces apart."""
    return float(answer.strip() in [reference.strip() for reference in references])


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """min(1, people who agree / 3), averaged over all choices of all but one of them (arXiv 1505.00468).

    Letter case, punctuation, articles and the spelling of numbers do not count. With fewer than four references one
    that agrees will do.
    """
    given, people = _plain(answer), [_plain(reference) for reference in references]
    if len(people) < 4:
        return float(given in people)
    agree = sum(person == given for person in people)
    return sum(min(1.0, (agree - (person == given)) / 3) for person in people) / len(people)


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption (arXiv 1411.5726) by `pycocoevalcap`; words are runs of letters and digits, lower-case.

    (Its usual tokenizer is a Java program, which splits a few words otherwise.)
    """
    from pycocoevalcap.cider.cider import Cider

    _, scores = Cider().compute_score(
        {index: [" ".join(_words(text)) for text in texts] for index, texts in enumerate(references)},
        {index: [" ".join(_words(text))] for index, text in enumerate(answers)},
    )
    return [float(score) for score in scores]


METRICS = {
    "exact": lambda answers, references: list(map(exact_match, answers, references)),
    "vqa": lambda answers, references: list(map(vqa_accuracy, answers, references)),
    "cider": cider,
}
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", re.sub(r"['’]", "", text.lower()))


def _plain(text: str) -> list[str]:
    words = (word for word in _words(text) if word not in ("a", "an", "the"))
    return [str(_NUMBERS.index(word)) if word in _NUMBERS else word for word in words]


def confidence(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's where scores are within 0..1, which is honest near 0 and 1; else normal."""
    count, mean, z = len(scores), sum(scores) / len(scores), 1.96
    if max(scores) > 1:
        half = z * torch.tensor(scores).std().item() / count**0.5
        return mean - half, mean + half
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (mean * (1 - mean) / count + z * z / (4 * count * count)) ** 0.5
    return max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))  # rounding aside


def select(queries: Tensor, support: Tensor, shots: int, how: str, generator: torch.Generator) -> Tensor:
    """The examples of each query, int64 [queries, shots], in the order of the prompt.

    Args:
        queries, support: an image feature each, [queries, V] and [support, V].
        how: "random", without repetition; "rices", by cosine similarity, the most similar one last.
    """
    if how == "random":
        draws = [torch.randperm(len(support), generator=generator)[:shots] for _ in queries]
        return torch.stack(draws)
    similarity = F.normalize(queries, dim=-1) @ F.normalize(support, dim=-1).T
    return similarity.topk(shots, dim=-1).indices.flip(-1)


@torch.no_grad()
def evaluate(
    model: Flamingo,
    tokenizer: PromptTokenizer,
    task: Task,
    *,
    shots: Sequence[int] = SHOTS,
    selection: str = "random",
    orders: int = 1,
    text_only: int = 2,
    batch_size: int = 16,
    max_new_tokens: int = 20,
    seed: int = 0,
) -> list[Score]:
    """Score a task at each number of shots. Every image is encoded once, and its features are kept in CPU memory.

    Args:
        selection: "random" or "rices".
        orders: of a closed task, orders of the examples over which log-likelihoods are averaged.
        text_only: with zero shots, examples without their images that tell the form of an answer; the paper's are 2.

    Raises:
        ValueError: an unknown selection, fewer examples than shots, or several orders of an open task.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"evaluate: selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")
    if max(*shots, 0 if min(shots) else text_only) > len(task.support):
        raise ValueError(f"evaluate: shots must be at most the {len(task.support)} examples, got {max(shots)}")
    if orders > 1 and not task.candidates:
        raise ValueError(f"evaluate: orders must be 1 where answers are written, got {orders}")
    model.eval()
    support, queries = _encode(model, task.support, batch_size), _encode(model, task.queries, batch_size)
    pooled = [torch.stack([shot.media[0].float().mean((0, 1)) for shot in part]) for part in (queries, support) if part]
    scores = []
    for count in shots:
        generator = torch.Generator().manual_seed(seed)
        drawn = count or text_only
        # examples without images are drawn at random, because likeness would give the answer away
        how = selection if count else "random"
        chosen = select(*pooled, drawn, how, generator) if drawn else torch.zeros(len(queries), 0, dtype=torch.int64)
        permuted = [chosen, *(chosen[:, torch.randperm(drawn, generator=generator)] for _ in range(orders - 1))]
        prompt = functools.partial(few_shot, template=task.template, text_only=count == 0)
        answers = []
        for start in tqdm.trange(0, len(queries), batch_size, desc=f"{count} shots", unit="batch"):
            part, batches = slice(start, start + batch_size), []
            for order in permuted:
                rows = zip(order[part].tolist(), queries[part], strict=True)
                prompts = [prompt([support[i] for i in row], query) for row, query in rows]
                batches.append(collate(prompts, tokenizer).to(model.resampler.latents.device))
            answers += _answers(model, tokenizer, task, batches, max_new_tokens)
        values = METRICS[task.metric](answers, task.references)
        scores.append(Score(count, sum(values) / len(values), *confidence(values), answers))
    return scores


def _answers(
    model: Flamingo, tokenizer: PromptTokenizer, task: Task, orders: Sequence[Batch], max_new_tokens: int
) -> list[str]:
    """What is written about each row; or the likeliest candidate, over the orders of a row's examples."""
    if not task.candidates:
        stop = task.template.partition("{answer}")[2]
        texts = generate_text(model, tokenizer, orders[0], stop=stop, max_new_tokens=max_new_tokens)
        return [text.strip() for text in texts]
    endings = [few_shot([], Shot([], candidate), task.template, target=True).target for candidate in task.candidates]
    ids = [tokenizer.text_ids(ending) for ending in endings]
    log_p = sum(rank(model, batch, ids) for batch in orders)
    return [task.candidates[index] for index in log_p.argmax(1).tolist()]


def _encode(model: Flamingo, shots: Sequence[Shot], batch_size: int) -> list[Shot]:
    """The shots with the features of their images."""
    media = [item for shot in shots for item in shot.media]
    features = []
    for start in range(0, len(media), batch_size):
        part = media[start : start + batch_size]
        encoded = model.encode(torch.cat(part).to(model.resampler.latents.device)).cpu()
        features += encoded.split([len(item) for item in part])
    rest = iter(features)
    return [dataclasses.replace(shot, media=list(itertools.islice(rest, len(shot.media)))) for shot in shots]


def read_shots(path: str, transform: Callable[[object], Tensor]) -> tuple[list[Shot], list[list[str]]]:
    """Examples of a folder or shard, named as training data: `cat.jpg`, `cat.txt` and maybe `cat.question.txt`.

    Each line of the text is an answer that counts as right; the first one is shown in prompts.

    Raises:
        ValueError: a sample without an image or an answer.
    """
    shots, references = [], []
    for shard in expand(path):
        for sample in read_shard(shard):
            frames, answers = frames_of(sample), sample.get("txt", b"").decode().split("\n")
            answers = [answer.strip() for answer in answers if answer.strip()]
            if not frames or not answers:
                name = f"{shard}: {sample['__key__']}"
                raise ValueError(f"read_shots: {name} must have an image and a .txt with an answer")
            media = torch.stack([transform(frame()) for frame in frames])
            shots.append(Shot([media], answers[0], sample.get("question.txt", b"").decode().strip()))
            references.append(answers)
    return shots, references


def table(results: Mapping[str, Sequence[Score]]) -> str:
    """One row per number of shots, one column per evaluation: score and 95 % interval."""
    lines = ["shots  " + "  ".join(f"{name:>24}" for name in results)]
    for row in zip(*results.values(), strict=True):
        cells = [f"{score.score:8.3f} ({score.low:.3f}..{score.high:.3f})" for score in row]
        lines.append(f"{row[0].shots:5d}  " + "  ".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def save(folder: pathlib.Path, results: Mapping[str, Sequence[Score]], chance: float | None = None) -> None:
    """Write `scores.json` and the curves over shots with their intervals, `scores.png`; chance as a dotted line."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: [dataclasses.asdict(score) for score in scores] for name, scores in results.items()}
    (folder / "scores.json").write_text(json.dumps(rows, indent=1))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, scores in results.items():
        mean = [score.score for score in scores]
        spread = [[score.score - score.low for score in scores], [score.high - score.score for score in scores]]
        axes.errorbar([score.shots for score in scores], mean, spread, label=name, marker="o", capsize=3)
    if chance is not None:
        axes.axhline(chance, linestyle=":", color="gray", label="chance")
    ticks = sorted({score.shots for scores in results.values() for score in scores})
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("shots")
    axes.set_ylabel("score, with 95 % interval")
    axes.legend()
    figure.savefig(folder / "scores.png", dpi=120)
