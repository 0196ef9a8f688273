"""A Flamingo that learns new kinds of handwriting from its prompt, in minutes on two CPU cores.

An episode shows digits, each followed by an arbitrary word that stands for its class in this episode alone; what the
next digit is called can be known from the prompt only. Training draws classes from seven digits, turned, mirrored and
laid over each other, and never shows more than 8 images in a row. Testing asks about images that training did not have:
of those seven digits, and of three digits that neither the Flamingo nor its vision encoder has ever seen.

One stage is not in the paper. Its models learn from web pages that what stands at <image> is about the image; here the
resampler and the first gated block are taught this directly, before any episode, without the language model and without
labels: at <image>, and nowhere else, a fixed random projection of the image's mean feature is to come out.
"""

import argparse
import itertools
import pathlib
import random
import re
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tqdm
from torch import Tensor, nn

import flamingo_kernels as fk
from flamingo.config import FlamingoConfig
from flamingo.digits import Digits, load_digits
from flamingo.evaluate import Score, confidence, save, table
from flamingo.language import load_smollm2
from flamingo.model import Flamingo
from flamingo.prompt import Example, PromptTokenizer, collate
from flamingo.train import Recipe, Trainer, train
from flamingo.vision import shift, train_encoder

CONFIG = FlamingoConfig(every=3, resampler_depth=2, resampler_dim_head=32, latents=4, ff_mult=2)
NOVEL = (7, 8, 9)
IMAGES = 8  # in a row, at most, of training
SHOTS = (0, 2, 4, 8, 16, 32)
BATCH, TEST_BATCH, ALIGN_BATCH = 16, 20, 64

# a digit, and which of the 8 turns and mirrorings of the square; one such, or two laid over each other, make a class
Glyph = tuple[int, int]
Kind = tuple[Glyph, ...]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flamingo.few_shot_demo", description=__doc__)
    parser.add_argument("--encoder-steps", type=int, default=700, help="of the vision encoder (default: %(default)s)")
    parser.add_argument("--align-steps", type=int, default=400, help="of the alignment (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="on episodes (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=600, help="on episodes, at most (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=400, help="of each test (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: %(default)s)")
    parser.add_argument("--output", type=pathlib.Path, default="demo-output/few-shot", help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    lm, tokenizer = load_smollm2()
    run(lm, PromptTokenizer(tokenizer, image_token="<file_sep>"), CONFIG, args)


def run(
    lm: nn.Module, tokenizer: PromptTokenizer, config: FlamingoConfig, args: argparse.Namespace
) -> dict[str, list[Score]]:
    """The demonstration on a given language model; returns what it writes to scores.json."""
    known, unseen = (by_digit(part) for part in load_digits(args.seed))
    familiar = [digit for digit in known if digit not in NOVEL]
    vision = train_encoder(glyphs(known, familiar), steps=args.encoder_steps, seed=args.seed)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    words = label_words(tokenizer)
    rng.shuffle(words)
    held_out, trained = words[: len(words) // 5], words[len(words) // 5 :]

    model = Flamingo(lm, vision, config)
    align(model, known, familiar, words, tokenizer, rng, args.align_steps)
    recipe = Recipe(args.steps, lr=3e-4, gate_lr=3e-3, beta2=0.999, warmup=10, cooldown=args.steps // 3)
    deadline = time.perf_counter() + args.seconds
    batches = training_batches(known, familiar, trained, tokenizer, rng)
    train(
        Trainer(model, recipe),
        {"episodes": itertools.takewhile(lambda _: time.perf_counter() < deadline, batches)},
    )

    results = {}
    for name, digits in (("unseen images", familiar), ("unseen digits", list(NOVEL))):
        episodes = [draw_episode(unseen, digits, held_out, rng) for _ in range(args.episodes)]
        results[name], results[f"{name}, prototypes"] = score(model, tokenizer, episodes)
    print(table(results))
    save(args.output, results, chance=0.5)
    print(f"wrote {args.output / 'scores.png'} and {args.output / 'scores.json'}")
    return results


def by_digit(digits: Digits) -> dict[int, Tensor]:
    """Images [n, 1, 8, 8] of each digit."""
    return {digit: digits.images[digits.labels == digit] for digit in range(10)}


def turned(images: Tensor, turn: int) -> Tensor:
    """One of the 8 turns and mirrorings of a square; 0 leaves it."""
    images = torch.rot90(images, turn % 4, (-2, -1))
    return images.flip(-1) if turn >= 4 else images


def known_turns(digit: int) -> list[int]:
    """Those that make no digit held out: a 6 upside down is a 9."""
    return [turn for turn in range(8) if (digit, turn) != (6, 2)]


def glyphs(images: dict[int, Tensor], digits: Sequence[int]) -> Digits:
    """Every image in every turn, each turn of a digit a class of its own, for the vision encoder."""
    kinds = [(digit, turn) for digit in digits for turn in known_turns(digit)]
    parts = [turned(images[digit], turn) for digit, turn in kinds]
    labels = [torch.full((len(part),), label) for label, part in enumerate(parts)]
    return Digits(torch.cat(parts), torch.cat(labels))


def draw_kinds(digits: Sequence[int], ways: int, rng: random.Random) -> list[Kind]:
    """Classes of a training episode, half of them overlays of two glyphs, no two of the same digits."""
    kinds: dict[frozenset[int], Kind] = {}
    while len(kinds) < ways:
        chosen = rng.sample(digits, rng.choice((1, 2)))
        kinds[frozenset(chosen)] = tuple((digit, rng.choice(known_turns(digit))) for digit in chosen)
    return list(kinds.values())


def draw_image(images: dict[int, Tensor], kind: Kind, rng: random.Random) -> Tensor:
    """[1, 8, 8]: a random image of each of its glyphs, laid over each other."""
    parts = [turned(images[digit][rng.randrange(len(images[digit]))], turn) for digit, turn in kind]
    return torch.stack(parts).amax(0)


def label_words(tokenizer: PromptTokenizer, most: int = 2000) -> list[int]:
    """Tokens that are a word of 3 to 8 small letters behind a blank, the commonest first (as BPE numbers them)."""
    words = []
    for token in range(len(tokenizer.tokenizer)):
        text = tokenizer.tokenizer.decode([token])
        if re.fullmatch(r" [a-z]{3,8}", text) and tokenizer.text_ids(text) == [token]:
            words.append(token)
    return words[:most]


def row(tokenizer: PromptTokenizer, labels: Sequence[int], targets: Sequence[bool], media: Sequence[Tensor]) -> Example:
    """Images [1, 8, 8], each with its label and a newline behind it; targets say which labels have a loss."""
    (end,) = tokenizer.text_ids("\n")
    ids, wanted = list(tokenizer.first), [False] * len(tokenizer.first)
    for label, target in zip(labels, targets, strict=True):
        ids += [tokenizer.image_id, label, end]
        wanted += [False, target, False]
    return Example(ids, wanted, [image[None] for image in media])


def training_batches(
    images: dict[int, Tensor],
    digits: Sequence[int],
    words: Sequence[int],
    tokenizer: PromptTokenizer,
    rng: random.Random,
) -> Iterator:
    """Episodes of two or three classes, for ever. A loss is on labels that have been shown before."""
    while True:
        rows = []
        for _ in range(BATCH):
            kinds = draw_kinds(digits, rng.choice((2, 3)), rng)
            labels = rng.sample(words, len(kinds))
            order = [rng.randrange(len(kinds)) for _ in range(IMAGES)]
            media = shift(torch.stack([draw_image(images, kinds[kind], rng) for kind in order]))
            shown = [kind in order[:place] for place, kind in enumerate(order)]
            rows.append(row(tokenizer, [labels[kind] for kind in order], shown, media))
        yield collate(rows, tokenizer)


def align(
    model: Flamingo,
    images: dict[int, Tensor],
    digits: Sequence[int],
    words: Sequence[int],
    tokenizer: PromptTokenizer,
    rng: random.Random,
    steps: int,
) -> None:
    """Teach resampler and first block to turn `<image>`, and nothing else, into a projection of the mean feature."""
    embed = model.lm.get_input_embeddings()
    scale = embed.weight.float().std()
    projection = torch.randn(model.vision.dim, embed.embedding_dim) * scale / model.vision.dim**0.5
    gates = [p for name, p in model.blocks[0].named_parameters() if name.endswith("_gate")]
    others = [p for name, p in model.blocks[0].named_parameters() if not name.endswith("_gate")]
    optimizer = torch.optim.AdamW(
        [{"params": [*others, *model.resampler.parameters()], "lr": 1e-3}, {"params": gates, "lr": 1e-2}],
        weight_decay=0.0,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 - 2 * step / steps))
    for _ in tqdm.trange(steps, desc="alignment", unit="step"):
        rows = []
        for _ in range(ALIGN_BATCH):
            kinds = draw_kinds(digits, 2, rng)
            media = shift(torch.stack([draw_image(images, kind, rng) for kind in kinds]))
            rows.append(row(tokenizer, rng.sample(words, 2), [False, False], media))
        batch = collate(rows, tokenizer)
        features = model.encode(batch.media)  # [B, 2, 1, S, V]
        text = embed(batch.input_ids).detach().float()
        wanted = text.clone()
        wanted[batch.media_locations] = (features.mean((2, 3)) @ projection).flatten(0, 1)
        with torch.autocast(text.device.type, model.lm.dtype, enabled=model.lm.dtype != torch.float32):
            kv = model.condition(features, len(text)).kv[0]
            intervals = fk.media_intervals(batch.media_locations, model.config.latents)
            given = model.blocks[0](text, intervals=intervals, kv=kv)
        loss = F.mse_loss(given, wanted) / scale**2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*others, *gates, *model.resampler.parameters()], 1.0)
        optimizer.step()
        schedule.step()
    print(f"alignment: an error of {loss.item():.3f} in units of the embeddings' variance")


class Episode(NamedTuple):
    """media: [33, 1, 8, 8]; order: int64 [33], which of the two classes each shows; labels: int64 [2], their words."""

    media: Tensor
    order: Tensor
    labels: Tensor


def draw_episode(images: dict[int, Tensor], digits: Sequence[int], words: Sequence[int], rng: random.Random) -> Episode:
    """Two digits, no image twice.

    Images come in pairs, one of each class in random order. So behind an even number of shots both classes have been
    seen equally often, and which one comes next is open: one reading of an episode gives a query for each such number.
    """
    pairs = (max(SHOTS) + 2) // 2
    chosen = [images[digit][rng.sample(range(len(images[digit])), pairs)] for digit in rng.sample(digits, 2)]
    order = [way for _ in range(pairs) for way in rng.sample((0, 1), 2)][: max(SHOTS) + 1]
    media = [chosen[way][order[:place].count(way)] for place, way in enumerate(order)]
    return Episode(torch.stack(media), torch.tensor(order), torch.tensor(rng.sample(words, 2)))


@torch.no_grad()
def score(model: Flamingo, tokenizer: PromptTokenizer, episodes: Sequence[Episode]) -> tuple[list[Score], list[Score]]:
    """Accuracy over shots: of the likelier of both words, and of the nearest mean feature of both classes."""
    model.eval()
    queries = torch.tensor(SHOTS)
    answers, nearest = [], []  # bool [episodes, shots]: right ones
    for start in tqdm.trange(0, len(episodes), TEST_BATCH, desc="testing", unit="batch"):
        media, order, labels = map(torch.stack, zip(*episodes[start : start + TEST_BATCH], strict=True))
        rows = [
            row(tokenizer, words[ways].tolist(), [False] * len(ways), images)
            for images, ways, words in zip(media, order, labels, strict=True)
        ]
        batch = collate(rows, tokenizer)
        features = model.encode(batch.media)  # [B, 33, 1, S, V]
        logits = model(
            batch.input_ids,
            model.condition(features, len(rows)),
            batch.media_locations,
            batch.attention_mask,
            logits_to_keep=batch.media_locations[0].nonzero().squeeze(1)[queries],  # rows are alike
        )
        likelier = logits.gather(2, labels[:, None].expand(-1, len(queries), -1)).argmax(2)
        answers.append(likelier == order[:, queries])
        closest = torch.stack([_nearest(features.mean((2, 3)), order, shots) for shots in SHOTS], dim=1)
        nearest.append(closest == order[:, queries])
    return _scores(torch.cat(answers)), _scores(torch.cat(nearest))


def _nearest(features: Tensor, order: Tensor, shots: int) -> Tensor:
    """int64 [B]: the class whose mean feature over the shots is nearest to that of the image behind them."""
    member = F.one_hot(order[:, :shots], 2).to(features.dtype)  # [B, shots, 2]
    prototypes = member.transpose(1, 2) @ features[:, :shots] / max(1, shots // 2)
    return (prototypes - features[:, shots, None]).square().sum(2).argmin(1)


def _scores(right: Tensor) -> list[Score]:
    return [
        Score(shots, column.float().mean().item(), *confidence(column.float().tolist()), [])
        for shots, column in zip(SHOTS, right.unbind(1), strict=True)
    ]


if __name__ == "__main__":
    main()
