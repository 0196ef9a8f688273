"""Training: what the loss counts and weighs, who learns how fast, and that images come to matter."""

import csv
import dataclasses
import itertools

import pytest
import torch

from flamingo import Batch, Flamingo, Prompt, PromptTokenizer, collate
from flamingo.generate import generate_text
from flamingo.language import decoder_layers
from flamingo.train import Recipe, Trainer, target_loss, train
from tests.flamingo.conftest import images, tiny_flamingo
from tests.support.calls import Calls

EXACT = Recipe(10, warmup=1, max_norm=float("inf"))


def batches(tokenizer: PromptTokenizer, dtype: torch.dtype = torch.float64) -> tuple[Batch, Batch]:
    """Two of unequal target counts, image counts and lengths."""
    one, two, three = (image.to(dtype) for image in images(3))
    few = collate([Prompt("<image>", [one], " a two\n")], tokenizer)
    many = collate(
        [
            Prompt("<image>", [three], " big one\n"),
            Prompt(" a seven\n<image> two\n<image> a", [two, one], " handwritten nine\n"),
        ],
        tokenizer,
    )
    return few, many


def exact_flamingo() -> Flamingo:
    return tiny_flamingo("gpt_neox", gates=0.5).double()


def gradients(model: Flamingo) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.new_parameters().items()}


def test_loss_counts_targets_only(family, tokenizer):
    one, two = images(2)
    model = tiny_flamingo(family, gates=0.5)
    batch = collate(
        [Prompt("<image>", [one], " a two\n"), Prompt(" a big seven\n<image> a handwritten", [two], " nine\n")],
        tokenizer,
    )
    batch.targets[1, 2] = True  # and one in the middle
    loss = target_loss(model, batch)
    logits = model(batch.input_ids, model.condition(batch.media, 2), batch.media_locations, batch.attention_mask)
    log_p = logits.log_softmax(-1)
    counted = [(0, t) for t in range(6, 9)] + [(1, 2)] + [(1, t) for t in range(7, 9)]
    assert batch.targets.nonzero().tolist() == [list(place) for place in counted]
    expected = -sum(log_p[row, t - 1, batch.input_ids[row, t]] for row, t in counted)
    torch.testing.assert_close(loss, expected)


def test_rows_of_both_kinds_see_the_last_image_or_the_next(tokenizer):
    one, two = images(2)
    model = tiny_flamingo(gates=0.7)
    batch = collate(
        [Prompt(" a<image> two\n<image> big\n", [one, two])] * 2 + [Prompt(" a a a<image> big big big", [one])],
        tokenizer,
    )
    attend_next = torch.tensor([False, True, True])

    @torch.no_grad()
    def logits(media: torch.Tensor) -> torch.Tensor:
        inputs = (batch.input_ids, model.condition(media, 3), batch.media_locations, batch.attention_mask)
        return model(*inputs, attend_next=attend_next)

    plain = logits(batch.media)
    first_changed = []  # what comes later changes too, by way of the language model
    for index in (0, 1):
        media = batch.media.clone()
        media[:, index] = media[:, index].flip(-1)
        changed = (logits(media) - plain).abs().amax(-1) > 1e-5
        first_changed.append([row.index(True) if any(row) else None for row in changed.tolist()])
    assert first_changed == [[1, 0, 0], [4, 2, None]]


def test_data_sets_are_weighted_means_over_tokens(tokenizer):
    few, many = batches(tokenizer)
    model = exact_flamingo()
    trainer = Trainer(model, EXACT, {"many": 0.2, "few": 3.0})
    expected_few = target_loss(model, few) / 3
    expected_many = target_loss(model, many) / (3 + 3)
    expected = 3.0 * expected_few + 0.2 * expected_many
    expected_gradients = torch.autograd.grad(expected, list(model.new_parameters().values()))

    losses = trainer.update({"many": [many], "few": [few]})
    assert losses["few"] == pytest.approx(expected_few.item(), rel=1e-12)
    assert losses["many"] == pytest.approx(expected_many.item(), rel=1e-12)
    assert losses[""] == pytest.approx(expected.item(), rel=1e-12)
    norm = torch.stack([gradient.norm() for gradient in expected_gradients]).norm().item()
    assert losses["norm"] == pytest.approx(norm, rel=1e-12)
    for gradient, expected_gradient in zip(gradients(model).values(), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def test_small_batches_together_are_the_big_one(tokenizer):
    one, two = images(2)
    prompts = [
        Prompt("<image>", [image.double()], text) for image, text in ((one, " a two\n"), (two, " big\n"), (two, " a"))
    ]
    parts, whole = (exact_flamingo() for _ in "12")
    small = [collate(prompts[:2], tokenizer), collate(prompts[2:], tokenizer)]
    losses = Trainer(parts, EXACT).update({"": small})
    expected = Trainer(whole, EXACT).update({"": [collate(prompts, tokenizer)]})
    assert losses == pytest.approx(expected, rel=1e-12)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], gradient)


def test_a_batch_without_targets_beside_others_changes_nothing(tokenizer):
    few, many = batches(tokenizer)
    with_text, without = exact_flamingo(), exact_flamingo()
    silent = dataclasses.replace(many, targets=torch.zeros_like(many.targets))
    assert Trainer(with_text, EXACT).update({"": [few, silent]}) == Trainer(without, EXACT).update({"": [few]})
    for name, gradient in gradients(without).items():
        assert torch.equal(gradients(with_text)[name], gradient)


def test_the_gradient_is_clipped(tokenizer):
    few, _ = batches(tokenizer)
    model = exact_flamingo()
    losses = Trainer(model, dataclasses.replace(EXACT, max_norm=0.01)).update({"": [few]})
    assert losses["norm"] > 0.1
    norm = torch.stack([gradient.norm() for gradient in gradients(model).values()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_a_data_set_without_targets_is_refused(tokenizer):
    few, _ = batches(tokenizer)
    with pytest.raises(ValueError, match="must hold a target token or more, got none in 'text'"):
        Trainer(exact_flamingo(), EXACT).update({"few": [few], "text": [collate([Prompt(" a")], tokenizer)]})


def test_what_is_computed_again_in_backward_is_the_same(tokenizer):
    few, many = batches(tokenizer)
    plain, again = exact_flamingo(), exact_flamingo()
    expected = Trainer(plain, EXACT).update({"few": [few], "many": [many]})
    trainer = Trainer(again, dataclasses.replace(EXACT, recompute=True))
    runs = []
    decoder_layers(again.lm)[0].mlp.register_forward_pre_hook(lambda *_: runs.append("layer"))
    with Calls() as calls:
        assert trainer.update({"few": [few], "many": [many]}) == expected
    assert len(runs) == 4  # forward and backward of two batches
    assert len(calls.args("gated_block")) >= 4 * len(again.blocks)
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(again)[name], gradient)


def test_autocast_multiplies_in_bf16(tokenizer):
    few, _ = batches(tokenizer, torch.float32)
    model = tiny_flamingo(gates=0.5)
    dtypes = []
    decoder_layers(model.lm)[0].mlp.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    plain = target_loss(model, few).item() / 3
    loss = Trainer(model, dataclasses.replace(EXACT, autocast=True)).update({"": [few]})[""]
    assert dtypes == [torch.float32, torch.bfloat16]
    assert loss == pytest.approx(plain, rel=0.05)
    assert {p.dtype for p in model.new_parameters().values()} == {torch.float32}


def test_padding_is_not_encoded(tokenizer):
    image = torch.stack(images(6)).double().squeeze(1)
    prompts = [
        Prompt("<image>", [image[:1]], " two\n"),
        Prompt("<image> one\n<image>", [image[1:4], image[4:6]], " nine\n"),
    ]
    seen = []
    model, plain = exact_flamingo(), exact_flamingo()
    model.vision.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    loss = Trainer(model, EXACT).update({"": [collate(prompts, tokenizer)]})[""]
    assert len(seen) == 1
    assert torch.equal(seen[0], image)
    alone = sum(target_loss(plain, collate([prompt], tokenizer)).item() for prompt in prompts) / 4
    assert loss == pytest.approx(alone, rel=1e-12)


def test_gates_learn_faster_and_the_resampler_does_not_decay():
    model = tiny_flamingo()
    trainer = Trainer(model, Recipe(40, lr=1e-3, gate_lr=1e-2))
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


def test_learning_rates_warm_up_stay_and_cool_down():
    paper = Recipe(100_000)
    assert [paper.rate(step) for step in (0, 2499, 4999, 50_000, 99_999)] == [1 / 5000, 0.5, 1, 1, 1]
    short = Recipe(40, warmup=10, cooldown=20)
    assert short.rate(0) == pytest.approx(0.1)
    assert [short.rate(step) for step in range(9, 21)] == [1] * 12
    assert [short.rate(step) for step in (30, 39, 40, 41)] == pytest.approx([0.5, 0.05, 0, 0])


def test_the_schedule_is_followed(tokenizer):
    few, _ = batches(tokenizer, torch.float32)
    trainer = Trainer(tiny_flamingo(), Recipe(3, lr=1e-3, gate_lr=1e-2, warmup=2))
    rates = []
    for _ in range(3):
        trainer.update({"": [few]})
        rates.append(sorted({group["lr"] for group in trainer.optimizer.param_groups}))
    assert rates == [pytest.approx([5e-4, 5e-3]), pytest.approx([1e-3, 1e-2]), pytest.approx([1e-3, 1e-2])]
    assert trainer.done == 3


def test_round_robin_takes_one_data_set_at_a_time(tokenizer, tmp_path):
    few, many = batches(tokenizer, torch.float32)
    taken = []

    def data(name: str, batch: Batch):
        while True:
            taken.append(name)
            yield batch

    recipe = Recipe(3, warmup=1, round_robin=True, accumulate=2)
    train(Trainer(tiny_flamingo(), recipe), {"few": data("few", few), "many": data("many", many)}, tmp_path)
    assert taken == ["few", "few", "many", "many", "few", "few"]
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [bool(row["loss/few"]) for row in rows] == [True, False, True]
    assert [bool(row["loss/many"]) for row in rows] == [False, True, False]


@pytest.mark.parametrize("family", ["llama", "opt"])
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
    recipe = Recipe(80, lr=3e-3, gate_lr=3e-2, warmup=10, cooldown=40)
    history = train(Trainer(model, recipe), {"captions": itertools.repeat(batch)})
    assert history.loss[-1] < 0.1 < history.loss[0]
    assert len(history.loss) == len(history.gates) == len(history.seconds) == 80
    assert all(torch.equal(frozen[name], p) for name, p in model.lm.state_dict().items())

    model.eval()
    asked = collate([Prompt(prompt.text, prompt.media) for prompt in prompts], tokenizer)
    assert [f"{text}\n" for text in generate_text(model, tokenizer, asked)] == [prompt.target for prompt in prompts]


def test_training_stops_where_its_data_end(tokenizer):
    few, _ = batches(tokenizer, torch.float32)
    history = train(Trainer(tiny_flamingo(), Recipe(50)), {"few": [few] * 2})
    assert len(history.loss) == 2


def test_an_unknown_way_of_parallel_training_is_refused():
    with pytest.raises(ValueError, match="parallel must be ddp or fsdp, got 'tensor'"):
        Recipe(1, parallel="tensor")
