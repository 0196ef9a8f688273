"""A checkpoint holds what was trained, and training goes on from it to the same bits."""

import csv
import dataclasses
import pathlib

import pytest
import torch
from safetensors.torch import load_file
from torchdata.stateful_dataloader import StatefulDataLoader

from flamingo import Flamingo, Prompt, PromptTokenizer, checkpoint, collate
from flamingo.data import Source, Stream
from flamingo.train import Recipe, Trainer, train
from tests.flamingo.conftest import CONFIG, WIDTH, tiny_flamingo, tiny_lm
from tests.flamingo.test_data import fill, pack, pairs, picture, transform


class Levels(torch.nn.Module):
    """A vision encoder for tests: a grey level [..., 1, 1, 1] to one token that tells it in waves."""

    dim = WIDTH

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.squeeze(-1) * torch.arange(1, WIDTH + 1) / 40).sin()


def flamingo() -> Flamingo:
    model = tiny_flamingo(gates=0.3)
    model.vision = Levels()
    return model


def loaders(folder: pathlib.Path, tokenizer: PromptTokenizer) -> dict[str, StatefulDataLoader]:
    sources = [Source("pairs", str(folder / "pairs")), Source("pages", str(folder / "pages"), tokens=8)]
    return {
        source.kind: StatefulDataLoader(
            Stream(source, tokenizer, transform, 2, shuffle=4, seed=number), batch_size=None, num_workers=0
        )
        for number, source in enumerate(sources)
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("data")
    for shard in range(2):
        pack(folder / f"pairs/{shard}.tar", pairs(range(5 * shard, 5 * shard + 5)))
    page = {"txt": b" a big<image> two\n one<image> nine<image> a", **{f"{n}.png": picture(90 + n) for n in range(3)}}
    fill(folder / "pages", {f"page{n}": page for n in range(3)})
    return folder


def run(data: pathlib.Path, folder: pathlib.Path, tokenizer: PromptTokenizer, steps: int, **options):
    """Losses of what this call trained, the parameters in the end, and the loaders."""
    trainer = Trainer(flamingo(), Recipe(7, lr=1e-2, warmup=3, cooldown=3), {"pages": 0.5})
    streams = loaders(data, tokenizer)
    stopping = {name: _Stopping(stream, steps) for name, stream in streams.items()}
    history = train(trainer, stopping, folder, save_every=1, about={"of": "a test"}, **options)
    return history.loss, {name: p.detach().clone() for name, p in trainer.trained().items()}


class _Stopping:
    """A loader that ends after some batches, as a training does that is killed."""

    def __init__(self, loader: StatefulDataLoader, batches: int) -> None:
        self.loader, self.batches = loader, batches
        self.state_dict, self.load_state_dict = loader.state_dict, loader.load_state_dict

    def __iter__(self):
        for _, batch in zip(range(self.batches), self.loader, strict=False):
            yield batch


def test_resumed_training_has_the_same_bits(data, tmp_path, tokenizer):
    losses, parameters = run(data, tmp_path / "whole", tokenizer, 7)
    first, _ = run(data, tmp_path / "parts", tokenizer, 4)
    torch.manual_seed(1234)  # what another process would start from
    second, resumed = run(data, tmp_path / "parts", tokenizer, 7)
    assert len(first) == 4
    assert first + second == losses
    assert all(torch.equal(resumed[name], p) for name, p in parameters.items())

    def log(folder: str) -> list[dict]:
        rows = list(csv.DictReader((tmp_path / folder / "log.csv").open()))
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    assert log("parts") == log("whole")
    assert [float(row["loss"]) for row in log("whole")] == losses


def test_what_was_logged_beyond_the_checkpoint_is_dropped(data, tmp_path, tokenizer):
    run(data, tmp_path, tokenizer, 4)
    for newer in ("step-0000004", "step-0000003"):
        (tmp_path / newer).rename(tmp_path / f"{newer}.unfinished")
    run(data, tmp_path, tokenizer, 1)
    assert [row["step"] for row in csv.DictReader((tmp_path / "log.csv").open())] == ["1", "2", "3"]


def test_rates_and_decay_are_those_of_the_recipe_that_goes_on(tmp_path):
    checkpoint.save(tmp_path, Trainer(flamingo(), Recipe(3, lr=1e-3)), {}, None)
    trainer = Trainer(flamingo(), Recipe(6, lr=2e-3, gate_lr=5e-3, weight_decay=0.3))
    expected = [{**group, "params": len(group["params"])} for group in trainer.optimizer.param_groups]
    checkpoint.load(checkpoint.latest(tmp_path), trainer, {})
    assert [{**group, "params": len(group["params"])} for group in trainer.optimizer.param_groups] == expected


def test_tuned_language_models_with_tied_embeddings_are_kept(tmp_path, tokenizer):
    def trainer() -> Trainer:
        lm = tiny_lm("opt")
        assert lm.config.tie_word_embeddings
        torch.manual_seed(1)
        model = Flamingo(lm, Levels(), dataclasses.replace(CONFIG, lm_weights="tuned"))
        return Trainer(model, Recipe(4, lr=1e-2, warmup=1))

    batch = collate([Prompt("<image>", [torch.rand(1, 1, 1, 1)], " a two\n")], tokenizer)
    whole = trainer()
    losses = [whole.update({"": [batch]})]
    checkpoint.save(tmp_path, whole, {}, None)
    losses.append(whole.update({"": [batch]}))
    resumed = trainer()
    checkpoint.load(checkpoint.latest(tmp_path), resumed, {})  # its random numbers too: this LM has dropout
    assert resumed.update({"": [batch]}) == losses[1]
    assert losses[1][""] < losses[0][""]
    for name, p in whole.trained().items():
        assert torch.equal(resumed.trained()[name], p), name
    assert any(name.startswith("lm.") for name in whole.trained())


def test_random_numbers_go_on(data, tmp_path, tokenizer):
    trainer = Trainer(flamingo(), Recipe(3))
    checkpoint.save(tmp_path, trainer, {}, None)
    drawn = torch.rand(3)
    torch.manual_seed(9)
    checkpoint.load(checkpoint.latest(tmp_path), trainer, {})
    assert torch.equal(torch.rand(3), drawn)


def test_a_checkpoint_holds_new_parameters_alone_and_only_the_newest_stay(data, tmp_path, tokenizer):
    _, parameters = run(data, tmp_path, tokenizer, 4)
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert names == ["step-0000002", "step-0000003", "step-0000004"]
    path = checkpoint.latest(tmp_path)
    assert path.name == names[-1]
    assert sorted(file.name for file in path.iterdir()) == [
        "about.json",
        "optimizer.pt",
        "rank-0.pt",
        "weights.safetensors",
    ]
    weights = load_file(path / checkpoint.WEIGHTS)
    assert weights.keys() == flamingo().new_parameters().keys()
    assert all(torch.equal(weights[name], p) for name, p in parameters.items())
    model = flamingo()
    model.load_new_state_dict(weights)
    assert all(torch.equal(p, parameters[name]) for name, p in model.new_parameters().items())
    assert (path / checkpoint.ABOUT).read_text() == '{\n "of": "a test"\n}'


def test_checkpoints_of_other_models_and_other_ranks_are_refused(data, tmp_path, tokenizer):
    run(data, tmp_path, tokenizer, 1)
    path = checkpoint.latest(tmp_path)
    trainer = Trainer(flamingo(), Recipe(3))
    trainer.world = 2
    with pytest.raises(ValueError, match="must come from 2 ranks, got 1"):
        checkpoint.load(path, trainer, {})
    trainer.world = 1
    with pytest.raises(ValueError, match=r"must hold the data sets that .* was at, missing: \['pages'\]"):
        checkpoint.load(path, trainer, {"pairs": None})
    trainer.model.blocks[0].attn_gate.requires_grad_(False)
    with pytest.raises(ValueError, match=r"wrong or missing: \['model.blocks.0.attn_gate'\]"):
        checkpoint.load(path, trainer, {})


def test_tensorboard_is_told_what_the_table_says(data, tmp_path, tokenizer):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses, _ = run(data, tmp_path, tokenizer, 2, tensorboard=True)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"loss", "loss/pairs", "loss/pages", "lr", "gates/attention"} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
