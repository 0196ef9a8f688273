"""The second demonstration's parts, and the whole of it in small."""

import argparse
import json
import random

import torch

from flamingo import FlamingoConfig, few_shot_demo
from flamingo.digits import load_digits
from tests.flamingo.conftest import VOCABULARY, tiny_lm

WORDS = [VOCABULARY.index(word) for word in (" two", " nine", " seven")]
ONES = {
    digit: torch.full((20, 1, 8, 8), digit / 10) + torch.arange(20)[:, None, None, None] / 1000 for digit in range(10)
}


def test_turns_are_the_symmetries_of_the_square():
    image = torch.rand(1, 8, 8)
    turns = [few_shot_demo.turned(image, turn) for turn in range(8)]
    assert torch.equal(turns[0], image)
    assert len({turn.numpy().tobytes() for turn in turns}) == 8
    assert torch.equal(turns[2], image.flip(-1).flip(-2))
    assert torch.equal(turns[4], image.flip(-1))


def test_every_turn_is_a_class_but_the_one_that_makes_a_nine():
    known = few_shot_demo.by_digit(load_digits(seed=0)[0])
    digits = few_shot_demo.glyphs(known, [5, 6])
    assert sorted(set(digits.labels.tolist())) == list(range(15))
    upside_down = few_shot_demo.turned(known[6], 2)[0]
    assert not any(torch.equal(image, upside_down) for image in digits.images)


def test_classes_of_an_episode_are_of_different_digits():
    rng = random.Random(0)
    episodes = [few_shot_demo.draw_kinds([0, 1, 2, 3], 3, rng) for _ in range(200)]
    for kinds in episodes:
        assert len({frozenset(digit for digit, _ in kind) for kind in kinds}) == 3
    sizes = [len(kind) for kinds in episodes for kind in kinds]
    assert 0.35 < sizes.count(2) / len(sizes) < 0.75
    image = few_shot_demo.draw_image(ONES, ((3, 0), (7, 1)), rng)
    assert 0.7 <= image.min() <= image.max() < 0.73


def test_training_counts_labels_that_were_shown(tokenizer):
    batches = few_shot_demo.training_batches(ONES, [0, 1, 2, 3], WORDS, tokenizer, random.Random(0))
    batch = next(batches)
    assert batch.media.shape[:2] == (few_shot_demo.BATCH, few_shot_demo.IMAGES)
    for ids, targets in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
        labels = ids[1::3]
        assert set(labels) <= set(WORDS)
        assert ids[0::3] == [tokenizer.image_id] * 8
        assert targets[1::3] == [label in labels[:place] for place, label in enumerate(labels)]
        assert not any(targets[0::3] + targets[2::3])


def test_episodes_are_balanced_and_open():
    rng = random.Random(0)
    episodes = [few_shot_demo.draw_episode(ONES, [7, 8, 9], WORDS, rng) for _ in range(400)]
    for media, order, labels in episodes[:20]:
        assert len({image.numpy().tobytes() for image in media}) == len(media) == 33
        assert len(set(labels.tolist())) == 2
        for shots in few_shot_demo.SHOTS:
            assert order[:shots].sum() * 2 == shots
        shown = [{round(image.min().item(), 1) for image in media[order == way]} for way in (0, 1)]
        assert len(shown[0]) == len(shown[1]) == 1
        assert shown[0] != shown[1]
    orders = torch.stack([episode.order for episode in episodes]).float()
    for shots in few_shot_demo.SHOTS:
        assert abs(orders[:, shots].mean() - 0.5) < 4 * 0.5 / 400**0.5
        if shots:  # and the last image does not tell the next
            agree = (orders[:, shots - 1] == orders[:, shots]).float().mean()
            assert abs(agree - 0.5) < 4 * 0.5 / 400**0.5


def test_the_nearest_prototype_is_found():
    features = torch.tensor([[[0.0, 0.0], [4.0, 4.0], [1.0, 1.0], [9.0, 9.0], [1.2, 1.2]]])
    order = torch.tensor([[0, 1, 0, 1, 0]])
    assert few_shot_demo._nearest(features, order, 4).tolist() == [0]
    assert few_shot_demo._nearest(features, order, 2).tolist() == [0]
    assert few_shot_demo._nearest(features, 1 - order, 4).tolist() == [1]


def test_words_are_single_tokens(tokenizer):
    words = [VOCABULARY[token] for token in few_shot_demo.label_words(tokenizer)]
    assert words == [word for word in VOCABULARY if word.startswith(" ") and 4 <= len(word) <= 9]


def test_the_demonstration_in_small(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(few_shot_demo, "ALIGN_BATCH", 4)
    config = FlamingoConfig(
        every=2, resampler_depth=1, resampler_heads=2, resampler_dim_head=8, latents=2, heads=2, dim_head=8
    )
    args = argparse.Namespace(
        encoder_steps=2, align_steps=2, steps=2, seconds=60, episodes=20, seed=0, output=tmp_path / "out"
    )
    results = few_shot_demo.run(tiny_lm(), tokenizer, config, args)
    written = json.loads((args.output / "scores.json").read_text())
    assert (
        written.keys()
        == results.keys()
        == {
            "unseen images",
            "unseen digits",
            "unseen images, prototypes",
            "unseen digits, prototypes",
        }
    )
    for scores in results.values():
        assert [score.shots for score in scores] == [0, 2, 4, 8, 16, 32]
        assert all(0 <= score.low <= score.score <= score.high <= 1 for score in scores)
    assert (args.output / "scores.png").exists()
    assert "unseen digits" in capsys.readouterr().out


def test_alignment_lowers_its_error(tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(few_shot_demo, "ALIGN_BATCH", 8)
    known, _ = load_digits(seed=0)
    vision = few_shot_demo.train_encoder(known, steps=1)
    errors = []
    for steps in (1, 60):
        torch.manual_seed(0)
        model = few_shot_demo.Flamingo(tiny_lm(), vision, few_shot_demo.CONFIG)
        images = few_shot_demo.by_digit(known)
        few_shot_demo.align(model, images, [1, 2, 3], WORDS, tokenizer, random.Random(0), steps)
        errors.append(float(capsys.readouterr().out.split("error of ")[1].split()[0]))
    assert errors[1] < 0.7 * errors[0]
