"""What the paper compares with is one flag each, and each flag changes what it says and nothing else."""

import pytest
import torch
from torch import nn

import flamingo_kernels as fk
from flamingo import Flamingo, Prompt, collate
from flamingo.ablations import MLPResampler, TransformerResampler, VanillaBlock
from flamingo.language import decoder_layers
from flamingo.train import Recipe, Trainer, target_loss
from tests.flamingo.conftest import FeaturesAsImages, images, tiny_flamingo, tiny_lm
from tests.flamingo.test_model import logits, plain_logits, ragged
from tests.nn import dense_flamingo

FLAGS = {
    "gates off": {"cross_attention": "ungated"},
    "vanilla cross-attention": {"cross_attention": "vanilla"},
    "all previous images": {"attend": "all"},
    "every layer": {"every": 1},
    "one block in the middle": {"every": 4, "offset": 2},
    "OpenFlamingo's placement": {"offset": 1},
    "MLP": {"resampler": "mlp"},
    "transformer": {"resampler": "transformer"},
    "LM tuned": {"lm_weights": "tuned"},
    "LM from scratch": {"lm_weights": "scratch"},
    "vision tuned": {"vision_weights": "tuned"},
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flagged_model_learns_what_it_should_and_nothing_else(flag, tokenizer):
    model = tiny_flamingo(gates=0.5, **FLAGS[flag]).train()
    batch = ragged(tokenizer)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = Trainer(model, Recipe(3, 1e-2, warmup=1))
    losses = [trainer.update({"": [batch]})[""] for _ in range(3)]
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == model.new_parameters().keys()
    parts = {"resampler", "blocks"} | ({"lm"} if flag.startswith("LM") else set())
    assert {name.partition(".")[0] for name in moved} == parts


@pytest.mark.parametrize(
    ("changes", "layers"),
    [({}, [0, 2]), ({"every": 1}, [0, 1, 2, 3]), ({"offset": 1}, [1, 3]), ({"every": 4, "offset": 2}, [2])],
)
def test_blocks_stand_where_every_and_offset_say(family, changes, layers, tokenizer):
    model = tiny_flamingo(family, gates=0.5, **changes)
    assert model.block_layers == layers
    called = []
    for index, layer in enumerate(decoder_layers(model.lm)):
        layer.register_forward_pre_hook(lambda *_, index=index: called.append(("layer", index)))
    for index, block in zip(layers, model.blocks, strict=True):
        block.register_forward_pre_hook(lambda *_, index=index: called.append(("block", index)))
    with torch.no_grad():
        logits(model, ragged(tokenizer))
    order = [(kind, i) for i in range(4) for kind in ("block", "layer") if kind == "layer" or i in layers]
    # a block's hook and that of its layer both run before the layer, in the order in which they were hung on it
    assert sorted(called) == sorted(order)
    assert [i for _, i in called] == [i for _, i in order]


def test_an_offset_beyond_the_layers_is_refused():
    with pytest.raises(ValueError, match="Flamingo: offset must be below the LM's 4 layers, got 4"):
        tiny_flamingo(offset=4)


def test_closed_gates_are_the_language_model_in_both_placements(family, tokenizer):
    batch, plain = ragged(tokenizer), tiny_lm(family).eval()
    with torch.no_grad():
        expected = plain_logits(plain, batch)
        for changes in ({"every": 3}, {"every": 3, "offset": 2}):
            assert torch.equal(logits(tiny_flamingo(family, **changes), batch), expected)


@torch.no_grad()
@pytest.mark.parametrize("cross_attention", ["ungated", "vanilla"])
def test_blocks_without_gates_are_plain_residuals(cross_attention, tokenizer):
    """What a gate of infinity gives, whose tanh is 1; without its feed-forward if vanilla."""
    model = tiny_flamingo(cross_attention=cross_attention)
    block = model.blocks[0]
    media, x = torch.randn(2, 6, 24), torch.randn(2, 5, 32)
    visible = torch.ones(2, 5, 6, dtype=torch.bool)
    parameters = dict(block.named_parameters())
    assert not any("gate" in name for name in parameters)
    parameters |= {"attn_gate": torch.tensor([torch.inf]), "ff_gate": torch.tensor([torch.inf])}
    if cross_attention == "vanilla":
        assert isinstance(block, VanillaBlock)
        assert not any(name.startswith(("ff_", "w_")) for name in dict(block.named_parameters()))
        zeros = torch.zeros(8, 32)
        parameters |= {"ff_norm.weight": torch.ones(32), "w_in.weight": zeros, "w_out.weight": zeros.T}
    expected = dense_flamingo.gated_block(parameters, x, media, visible, heads=2)
    intervals = fk.Intervals(torch.zeros(2, 5, dtype=torch.int32), torch.full((2, 5), 6, dtype=torch.int32))
    torch.testing.assert_close(block(x, media, intervals), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.gates(), torch.ones(2, 2))
    assert model.new_state_dict().keys() == model.new_parameters().keys()


@torch.no_grad()
@pytest.mark.parametrize("attend", ["latest", "all"])
def test_earlier_images_are_seen_where_all_are(attend, tokenizer):
    """By the block; later tokens hear of an image through the language model in any case."""
    model = tiny_flamingo(gates=0.5, attend=attend)
    seen = []
    model.blocks[0].register_forward_hook(lambda block, args, output: seen.append(output[0, -1]))
    one, two, three = images(3)
    for earlier in (one, two):
        logits(model, collate([Prompt("<image> a<image> two", [earlier, three])], tokenizer))
    assert torch.equal(*seen) == (attend == "latest")


def test_a_language_model_from_scratch_is_another_one():
    pretrained = tiny_lm()
    torch.manual_seed(5)
    model = Flamingo(pretrained, FeaturesAsImages(), tiny_flamingo(lm_weights="scratch").config)
    assert type(model.lm) is type(pretrained)
    for (name, p), q in zip(model.lm.named_parameters(), pretrained.parameters(), strict=True):
        assert p.shape == q.shape
        assert p.requires_grad
        if p.ndim > 1:
            assert not torch.equal(p, q), name
    assert model.train().lm.training
    assert not model.eval().lm.training
    assert not tiny_flamingo().train().lm.training


def sizes(resampler: str) -> nn.Module:
    torch.manual_seed(0)
    return tiny_flamingo(resampler=resampler, max_frames=2, resampler_depth=2).resampler.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["perceiver", "mlp", "transformer"])
def test_resamplers_take_videos_of_any_lengths(kind):
    """Frames that pad a video change nothing; other patches and other frames change its latents, and only its."""
    resampler = sizes(kind)
    assert isinstance(resampler, {"mlp": MLPResampler, "transformer": TransformerResampler}.get(kind, nn.Module))
    x = torch.randn(2, 3, 4, 6, 24)
    counts = torch.tensor([[1, 4, 2], [3, 0, 4]])
    latents = resampler(x, frame_counts=counts)
    assert latents.shape == (2, 3, 3, 24)
    assert latents.isfinite().all()
    padded = x.clone()
    for row, media in ((0, 0), (0, 2), (1, 0), (1, 1)):
        padded[row, media, counts[row, media] :] = 1e4
    torch.testing.assert_close(resampler(padded, frame_counts=counts), latents)
    alone = resampler(x[:1, 2:, :2])
    torch.testing.assert_close(alone[0, 0], latents[0, 2], atol=1e-5, rtol=1e-5)
    x[0, 1, 3, 5] = 5 * torch.randn(24)
    changed = (resampler(x, frame_counts=counts) - latents).abs().amax((2, 3)) > 1e-4
    assert changed.tolist() == [[False, True, False], [False, False, False]]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["perceiver", "transformer"])
def test_the_order_of_frames_matters_where_frames_have_embeddings(kind):
    resampler, x = sizes(kind), torch.randn(1, 1, 3, 4, 24)
    assert not torch.allclose(resampler(x), resampler(x.flip(2)), atol=1e-3)


def test_the_loss_of_a_video_does_not_ask_for_its_padding(tokenizer):
    one, two = torch.randn(1, 5, 24), torch.randn(3, 5, 24)
    prompts = [Prompt("<image>", [one], " a two\n"), Prompt("<image> a<image>", [two, one], " nine\n")]
    model = tiny_flamingo(gates=0.5, max_frames=2)
    batch = collate(prompts, tokenizer)
    assert batch.frame_counts.tolist() == [[1, 0], [3, 1]]
    apart = sum(target_loss(model, collate([prompt], tokenizer)) for prompt in prompts)
    torch.testing.assert_close(target_loss(model, batch), apart, atol=1e-4, rtol=1e-4)
