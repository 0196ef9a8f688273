"""Configurations go through JSON, and every preset builds, on the meta device, at the published sizes."""

import dataclasses
import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

from flamingo import Flamingo, FlamingoConfig
from flamingo.config import PRESETS, LanguageConfig
from flamingo.language import build_lm
from flamingo.vision import TimmVision, build_vision

PARTS = ("language model", "vision encoder", "gated blocks", "resampler")
# Published, in millions, and half of the last digit published. The paper: its table 1 (arXiv 2204.14198).
# flamingo-mini: the page "Model Configurations" of its wiki, github.com/dhansmair/flamingo-mini. OpenFlamingo's
# language models: the cards of MPT-1B and RedPajama-INCITE-3B, and the 13,298,573,312 bytes of MPT-7B's bf16 weights.
PUBLISHED = {
    "flamingo-3b": ((1400, 50), (435, 0.5), (1200, 50), (194, 0.5)),
    "flamingo-9b": ((7100, 50), (435, 0.5), (1600, 50), (194, 0.5)),
    "flamingo-80b": ((70000, 500), (435, 0.5), (10000, 500), (194, 0.5)),
    "openflamingo-3b": ((1300, 50), (303, 0.5), None, None),
    "openflamingo-4b": ((2800, 50), (303, 0.5), None, None),
    "openflamingo-9b": ((6649.3, 0.05), (303, 0.5), None, None),
    "flamingo-mini": ((331, 0.5), (303, 0.5), None, (101, 0.5)),
}
# What the paper's counts hold and the stand-ins for its parts do not: Chinchilla's relative positions, a dim x dim
# matrix a layer as in Transformer-XL; and NFNet's last convolution, 1536 to 3072 with bias and gain. The paper does not
# say that it counts these, but with them its counts of the 3B's and 80B's LM and of the encoder come out.
POSITIONS = {"flamingo-3b": 24 * 2048**2, "flamingo-9b": 40 * 4096**2, "flamingo-80b": 80 * 8192**2}
LAST_CONVOLUTION = (1536 + 2) * 3072
# Where the sizes that the paper states (its table 5) do not make the counts that it states, the presets have the sizes.
# They make these counts, to the million. (40 layers of 4,096 make no 7.1 B in any transformer; 32 would.)
OF_STATED_SIZES = {
    ("flamingo-9b", "language model"): 8988,
    ("flamingo-9b", "gated blocks"): 1804,
    ("flamingo-80b", "gated blocks"): 8355,
    **{(name, "resampler"): 170 for name in POSITIONS},
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def nfnet_width() -> nn.Module:
    """In the place of NFNet-F6 where timm cannot be imported: its width alone."""
    encoder = nn.Module()
    encoder.dim = 1536
    return encoder


def build(name: str, nfnet_width: nn.Module) -> Flamingo:
    config = PRESETS[name]
    with torch.device("meta"):
        stand_in = config.vision.kind == "timm" and not _imports("timm")
        vision = nfnet_width if stand_in else build_vision(config.vision)
        return Flamingo(build_lm(config.language), vision, config)


def _imports(name: str) -> bool:
    try:
        __import__(name)
    except Exception:  # torchvision, which timm needs, raises RuntimeError beside another torch than its own
        return False
    return True


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name, nfnet_width):
    model = build(name, nfnet_width)
    counts = dict(zip(PARTS, map(count, (model.lm, model.vision, model.blocks, model.resampler)), strict=True))
    if name in POSITIONS:
        counts["language model"] += POSITIONS[name]
        counts["vision encoder"] += LAST_CONVOLUTION
    for part, published in zip(PARTS, PUBLISHED[name], strict=True):
        if published is None or (part == "vision encoder" and model.vision is nfnet_width):
            continue
        expected, off = published
        if (name, part) in OF_STATED_SIZES:
            assert abs(counts[part] / 1e6 - expected) > off
            expected, off = OF_STATED_SIZES[name, part], 0.5
        assert counts[part] / 1e6 == pytest.approx(expected, abs=off), part


def test_openflamingo_counts_to_the_last_parameter(nfnet_width):
    """1,046,992,944 are trained in OpenFlamingo-3B, its 50,280 embeddings of 2,048 among them.

    That is what its code prints of itself, as for instance the README of the GitHub repository Visual_assist has it.
    """
    model = build("openflamingo-3b", nfnet_width)
    assert sum(p.numel() for p in model.new_parameters().values()) + 50280 * 2048 == 1_046_992_944


def test_flamingo_mini_has_the_529_million_that_its_wiki_says_are_trained(nfnet_width):
    """Again with the embeddings of the language model."""
    model = build("flamingo-mini", nfnet_width)
    new = sum(p.numel() for p in model.new_parameters().values())
    assert round((new + count(model.lm.get_input_embeddings())) / 1e6) == 529


@pytest.mark.skipif(importlib.util.find_spec("open_flamingo") is None, reason="needs open-flamingo")
@pytest.mark.parametrize("name", ["openflamingo-3b", "openflamingo-4b", "openflamingo-9b"])
def test_new_parameters_are_as_many_as_in_openflamingos_modules(name, nfnet_width, open_flamingo_helpers):
    model = build(name, nfnet_width)
    config = model.config.language
    with torch.device("meta"):
        theirs = open_flamingo_helpers.GatedCrossAttentionBlock(dim=config.dim, dim_visual=1024)
        resampler = open_flamingo_helpers.PerceiverResampler(dim=1024)
    assert len(model.blocks) == sum((i + 1) % model.config.every == 0 for i in range(config.layers))
    assert count(model.blocks) == len(model.blocks) * count(theirs)
    assert count(model.resampler) == count(resampler)


@pytest.fixture
def open_flamingo_helpers(monkeypatch) -> types.ModuleType:
    """The package's __init__ wants open_clip, which this file of its does not."""
    spec = importlib.util.find_spec("open_flamingo")
    path = f"{spec.submodule_search_locations[0]}/src/helpers.py"
    spec = importlib.util.spec_from_file_location("open_flamingo_helpers", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("flamingo-3b", list(range(24))),
        ("flamingo-9b", list(range(0, 40, 4))),
        ("flamingo-80b", [0, 7, 14, 21, 28, 35, 42, 49, 56, 63, 70, 77]),
        ("openflamingo-3b", list(range(24))),
        ("openflamingo-4b", list(range(1, 32, 2))),
        ("openflamingo-9b", [3, 7, 11, 15, 19, 23, 27, 31]),
        ("flamingo-mini", list(range(24))),
        ("tiny", [0, 2]),
    ],
)
def test_presets_place_their_blocks(name, layers):
    assert PRESETS[name].block_layers(PRESETS[name].language.layers) == layers


def test_tiny_is_built_with_weights_and_runs():
    torch.manual_seed(0)
    config = PRESETS["tiny"]
    model = Flamingo(build_lm(config.language), build_vision(config.vision), config)
    assert count(model) < 1e6
    features = model.encode(torch.rand(2, 3, 5, 3, 32, 32))  # 5 frames, more than max_frames
    locations = torch.zeros(2, 7, dtype=torch.bool)
    locations[:, [0, 2, 3]] = True
    logits = model(torch.ones(2, 7).long(), model.condition(features, 2), locations, torch.ones(2, 7).long())
    assert logits.shape == (2, 7, 512)
    assert logits.isfinite().all()


def test_weights_are_loaded_from_where_the_configuration_says(tmp_path):
    torch.manual_seed(0)
    language, vision = PRESETS["tiny"].language, dataclasses.replace(PRESETS["tiny"].vision, kind="clip")
    for builder, config in ((build_lm, language), (build_vision, vision)):
        saved = builder(config)
        (saved.model if config is vision else saved).save_pretrained(tmp_path / config.kind)
        loaded = builder(dataclasses.replace(config, weights=str(tmp_path / config.kind)), pretrained=True)
        for name, value in saved.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        with pytest.raises(ValueError, match="config must name its weights, got None"):
            builder(config, pretrained=True)


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    assert FlamingoConfig.from_json(PRESETS[name].to_json()) == PRESETS[name]


def test_json_may_leave_out_defaults_and_has_no_unknown_fields():
    assert FlamingoConfig.from_json('{"every": 3}') == FlamingoConfig(every=3)
    with pytest.raises(ValueError, match=r"FlamingoConfig: unknown fields \['ever'\]"):
        FlamingoConfig.from_json('{"ever": 3}')
    with pytest.raises(ValueError, match=r"LanguageConfig: unknown fields \['depth'\]"):
        FlamingoConfig.from_json('{"language": {"kind": "llama", "depth": 3}}')


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attend", "last"),
        ("cross_attention", "open"),
        ("resampler", "conv"),
        ("lm_weights", "thawed"),
        ("vision_weights", "scratch"),
        ("every", 0),
        ("offset", -1),
    ],
)
def test_what_cannot_be_is_refused(field, value):
    with pytest.raises(ValueError, match=f"FlamingoConfig: .*{field}"):
        FlamingoConfig(**{field: value})


def test_kinds_that_nobody_knows_are_refused():
    with pytest.raises(ValueError, match="no_such_kind"):
        build_lm(LanguageConfig("no_such_kind", 2, 8, 2, 10))
    with pytest.raises(ValueError, match="build_vision: kind must be one of"):
        build_vision(dataclasses.replace(PRESETS["tiny"].vision, kind="resnet"))
    assert isinstance(build_vision(PRESETS["tiny"].vision), TimmVision)
