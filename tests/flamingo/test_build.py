"""A model is built from a description in JSON, and images come to it as its encoder was trained to see them."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from flamingo import FlamingoConfig
from flamingo.build import Description, ImageTransform, build, language_of, load, vision_of
from flamingo.config import PRESETS
from tests.flamingo.conftest import CONFIG, FAMILIES, VOCABULARY, tiny_lm, word_tokenizer

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 8,
}
VISION = {"clip": (CLIPVisionModel, CLIPVisionConfig), "siglip": (SiglipVisionModel, SiglipVisionConfig)}


@pytest.fixture(params=["gpt2", "opt"])
def lm_folder(request: pytest.FixtureRequest, tmp_path) -> str:
    tiny_lm(request.param).save_pretrained(tmp_path / "lm")
    word_tokenizer().save_pretrained(tmp_path / "lm")
    return str(tmp_path / "lm")


@pytest.mark.parametrize("kind", VISION)
def test_models_are_built_from_folders(lm_folder, tmp_path, kind):
    model, config = VISION[kind]
    torch.manual_seed(0)
    saved = model(config(**SIZES)).eval()
    saved.save_pretrained(tmp_path / "vision")
    vision = vision_of(str(tmp_path / "vision"))
    assert (vision.kind, vision.dim, vision.patch, vision.resolution) == (kind, 16, 4, 8)
    language = language_of(lm_folder)
    assert FAMILIES[language.kind]
    assert (language.layers, language.dim, language.heads, language.vocabulary) == (4, 32, 4, len(VOCABULARY))
    description = Description(dataclasses.replace(CONFIG, language=language, vision=vision), lm_dtype="bfloat16")
    built = build(Description.from_dict(json.loads(json.dumps(description.to_dict()))))
    assert built.model.lm.dtype == torch.bfloat16
    assert built.tokenizer.image_id == VOCABULARY.index("<image>")
    image = built.transform(Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)))
    with torch.no_grad():
        patches = saved(image[None]).last_hidden_state[:, -4:]  # behind CLIP's class token
    torch.testing.assert_close(built.model.encode(image[None]), patches)
    mean = 0.48145466 if kind == "clip" else 0.5
    std = 0.26862954 if kind == "clip" else 0.5
    assert built.transform(Image.new("RGB", (9, 5), (255, 0, 0)))[0].unique().tolist() == pytest.approx(
        [(1 - mean) / std]
    )


def test_what_is_drawn_depends_on_the_seed_alone(lm_folder):
    config = dataclasses.replace(PRESETS["tiny"], language=language_of(lm_folder))
    first, torch_seeded, other = (build(Description(config, seed=seed)).model.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(value, torch_seeded[name]) for name, value in first.items())
    for part in ("vision.", "resampler.", "blocks."):
        assert any(not torch.equal(value, other[name]) for name, value in first.items() if name.startswith(part))


def test_images_are_scaled_and_cut_around_their_middle():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 16:44] = 255  # white in the middle third, and as far beyond as bicubic weights reach
    transform = ImageTransform(10, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    square = transform(Image.fromarray(pixels))
    assert square.shape == (3, 10, 10)
    torch.testing.assert_close(square, torch.ones(3, 10, 10))


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(ValueError, match="must describe a language model and a vision encoder"):
        build(Description(FlamingoConfig()))
    with pytest.raises(ValueError, match="tokenizer must be named where the language model has no weights"):
        build(Description(PRESETS["tiny"]))
    (tmp_path / "about.json").write_text("{}")
    with pytest.raises(ValueError, match="must be of a checkpoint that describes its model"):
        load(tmp_path)
