"""Training: what the loss counts, who learns how fast, and that images come to matter."""

import itertools

import pytest
import torch

from flamingo import Prompt, collate
from flamingo.generate import generate_text
from flamingo.train import Trainer, target_loss, train
from tests.flamingo.conftest import images, tiny_flamingo


def test_loss_counts_targets_only(family, tokenizer):
    one, two = images(2)
    model = tiny_flamingo(family, gates=0.5)
    batch = collate(
        [Prompt("<image>", [one], " a two\n"), Prompt(" a big seven\n<image> a handwritten", [two], " nine\n")],
        tokenizer,
    )
    loss = target_loss(model, batch)
    logits = model(batch.input_ids, model.condition(batch.media, 2), batch.media_locations, batch.attention_mask)
    log_p = logits.log_softmax(-1)
    counted = [(0, t) for t in range(6, 9)] + [(1, t) for t in range(7, 9)]
    assert batch.targets.nonzero().tolist() == [list(place) for place in counted]
    expected = -sum(log_p[row, t - 1, batch.input_ids[row, t]] for row, t in counted) / len(counted)
    torch.testing.assert_close(loss, expected)


def test_a_batch_without_targets_is_refused(tokenizer):
    with pytest.raises(ValueError, match="target_loss: batch must hold a target token"):
        target_loss(tiny_flamingo(), collate([Prompt(" a")], tokenizer))


def test_gates_learn_faster_and_the_resampler_does_not_decay():
    model = tiny_flamingo()
    trainer = Trainer(model, 40, lr=1e-3, gate_lr=1e-2)
    found = {
        id(p): (group["initial_lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }
    assert len(found) == len(model.new_parameters())
    for name, p in model.new_parameters().items():
        expected_lr = 1e-2 if "gate" in name else 1e-3
        expected_decay = 0.1 if name.startswith("blocks") and "norm" not in name and "gate" not in name else 0.0
        assert found[id(p)] == (expected_lr, expected_decay), name


def test_learning_rates_warm_up_and_fall(tokenizer):
    batch = collate([Prompt("<image>", images(1), " a\n")], tokenizer)
    trainer = Trainer(tiny_flamingo(), 40, lr=1e-3, gate_lr=1e-2)
    rates = []
    for _ in range(42):  # beyond its steps nothing moves
        rates.append(max(group["lr"] for group in trainer.optimizer.param_groups))
        trainer.step(batch)
    assert rates[0] == pytest.approx(1e-3)
    assert rates[9:21] == pytest.approx([1e-2] * 12)
    assert rates[30] == pytest.approx(0.5e-2)
    assert rates[39] == pytest.approx(0.05e-2)
    assert rates[40:] == [0, 0]


def test_the_latest_image_decides_the_caption(family, tokenizer):
    one, two = images(2)
    captions = [" a handwritten seven\n", " a big two\n"]
    second = f"<image>{captions[0]}<image>"  # the same text before both captions
    prompts = [
        Prompt("<image>", [one], captions[0]),
        Prompt("<image>", [two], captions[1]),
        Prompt(second, [two, one], captions[0]),
        Prompt(second, [one, two], captions[1]),
    ]
    model = tiny_flamingo(family)
    frozen = {name: p.clone() for name, p in model.lm.state_dict().items()}
    batch = collate(prompts, tokenizer)
    history = train(Trainer(model, 80, lr=3e-3, gate_lr=3e-2), itertools.repeat(batch))
    assert history.loss[-1] < 0.1 < history.loss[0]
    assert len(history.loss) == len(history.gates) == len(history.seconds) == 80
    assert all(torch.equal(frozen[name], p) for name, p in model.lm.state_dict().items())

    model.eval()
    asked = collate([Prompt(prompt.text, prompt.media) for prompt in prompts], tokenizer)
    assert [f"{text}\n" for text in generate_text(model, tokenizer, asked)] == [prompt.target for prompt in prompts]


def test_training_stops_when_time_is_up(tokenizer):
    batch = collate([Prompt("<image>", images(1), " a\n")], tokenizer)
    history = train(Trainer(tiny_flamingo(), 50, lr=1e-3, gate_lr=1e-2), itertools.repeat(batch), seconds=0)
    assert history.loss == []
