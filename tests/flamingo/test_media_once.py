"""The media of a prompt are resampled once and projected once, for all blocks together and all tokens to come."""

import torch

from flamingo import Batch, Prompt, collate
from flamingo.generate import generate, rank
from flamingo.train import target_loss
from tests.flamingo.conftest import CONFIG, images, tiny_flamingo
from tests.support.calls import Calls


def two_prompts(tokenizer, target: str = "") -> Batch:
    one, two, three = images(3)
    return collate([Prompt("<image>", [one], target), Prompt("<image> a<image>", [two, three], target)], tokenizer)


def assert_media_once(calls: Calls, blocks: int) -> None:
    """One projection of all layers of the resampler, which has norms, and one of all blocks, which has none."""
    of_resampler, of_blocks = [(len(weights), len(norms)) for _, weights, norms, *_ in calls.args("media_kv")]
    assert of_resampler == (CONFIG.resampler_depth, CONFIG.resampler_depth)
    assert of_blocks == (blocks, 0)
    assert len(calls.args("latent_attention")) == CONFIG.resampler_depth


def test_in_training(tokenizer):
    model = tiny_flamingo(gates=0.5).train()
    with Calls() as calls:
        target_loss(model, two_prompts(tokenizer, " a two\n")).backward()
    assert_media_once(calls, len(model.blocks))
    assert len(calls.args("media_kv_backward")) == 2


def test_in_generation(tokenizer):
    model, tokens = tiny_flamingo(gates=0.5), 5
    with Calls() as calls:
        generate(model, two_prompts(tokenizer), max_new_tokens=tokens)
    assert_media_once(calls, len(model.blocks))
    # all of the prompt but its last token is one pass
    assert len(calls.args("gated_block")) == (1 + tokens) * len(model.blocks)


def test_in_ranking(tokenizer):
    model = tiny_flamingo(gates=0.5)
    answers = [tokenizer.text_ids(answer) for answer in (" a two", " a big seven")]
    with Calls() as calls:
        rank(model, two_prompts(tokenizer), answers)
    assert_media_once(calls, len(model.blocks))


def test_an_adapter_on_one_block_is_used(tokenizer):
    """It takes its own block out of the common projection, and nothing else changes."""
    model, media = tiny_flamingo().double(), torch.stack(images(2)).unsqueeze(0).double()
    before = model.condition(media, 1).kv
    called = []
    model.blocks[1].to_kv.register_forward_hook(lambda *_: called.append(True))
    after = model.condition(media, 1).kv
    assert called == [True]
    for old, new in zip(before, after, strict=True):
        for a, b in zip(old, new, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=64 * torch.finfo(torch.float64).eps * a.abs().max().item())
