"""Whole models of OpenFlamingo, IDEFICS and Llama 3.2 Vision, small and random, before and after patching."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import flamingo_kernels as fk
from tests.support.process import normal_process
from tests.support.public import open_flamingo, public

pytestmark = normal_process
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
MEDIA = 49
IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))


class Encoder(nn.Module):
    """Patches [n, 4, 32] of images [n, 3, 4, 4], as open_clip's gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 2, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        return patches.mean(1), patches


def _open_flamingo() -> tuple[nn.Module, dict, int]:
    public("open_flamingo")
    config = transformers.OPTConfig(
        vocab_size=50,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        dropout=0.0,
    )
    lm = transformers.OPTForCausalLM(config)
    open_flamingo("utils").extend_instance(lm, open_flamingo("flamingo_lm").FlamingoLMMixin)
    lm.set_decoder_layers_attr_name("model.decoder.layers")
    vision = nn.Module()
    vision.visual = Encoder()
    model = open_flamingo("flamingo").Flamingo(vision, lm, eoc_token_id=48, media_token_id=MEDIA, vis_dim=32)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[:, 2] = ids[0, 5] = MEDIA
    mask[0, 0] = 0  # without padding, transformers leaves out the mask, which OpenFlamingo wants
    return model, {"vision_x": torch.randn(2, 2, 1, 3, 4, 4), "lang_x": ids, "attention_mask": mask}, 1 + 2 * 2


def _idefics() -> tuple[nn.Module, dict, int]:
    vision = {"embed_dim": 20, "image_size": 8, "patch_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1}
    resampler = {"resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 8}
    config = transformers.IdeficsConfig(
        vocab_size=60,
        additional_vocab_size=2,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        cross_layer_interval=2,
        qk_layer_norms=True,
        use_resampler=True,
        vision_config=vision | {"intermediate_size": 24},
        perceiver_config=resampler,
    )
    images = torch.zeros(2, 9, 3, dtype=torch.long)
    images[:, 2:5, 0] = images[:, 5:, 1] = images[1, 7:, 2] = 1
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "image_attention_mask": images}
    model = transformers.IdeficsForVisionText2Text(config)
    return model, inputs | {"pixel_values": torch.randn(2, 3, 3, 8, 8)}, 1 + 2


def _mllama() -> tuple[nn.Module, dict, int]:
    text = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1, 3], "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 8, "patch_size": 4, "max_num_tiles": 2, "vision_output_dim": 32}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
    model = transformers.MllamaForConditionalGeneration(
        transformers.MllamaConfig(text_config=text, vision_config=vision)
    )
    tiles = torch.zeros(2, 9, 2, 2)
    tiles[0, 2:, 0] = tiles[1, 3:6, 0] = tiles[1, 6:, 1, 0] = 1
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "cross_attention_mask": tiles}
    inputs |= {"pixel_values": torch.randn(2, 2, 2, 3, 8, 8), "aspect_ratio_ids": torch.ones(2, 2, dtype=torch.long)}
    return model, inputs | {"aspect_ratio_mask": torch.ones(2, 2, 2, dtype=torch.long)}, 2


def _step(model: nn.Module, inputs: dict) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(**inputs).logits
    logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | gradients


@pytest.mark.parametrize("build", [_open_flamingo, _idefics, _mllama])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_before_and_after(build):
    """Logits, gradients (also with layers checkpointed, where the model can), generated tokens."""
    torch.manual_seed(0)
    model, inputs, parts = build()
    for name, parameter in model.named_parameters():
        if ("gate" in name and parameter.numel() == 1) or "alpha" in name:
            nn.init.constant_(parameter, 0.7)
    generate = {**inputs, "max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    before, said = _step(model, inputs), model.eval().generate(**generate)

    handle = fk.patch(model)
    assert len(handle.patched) == parts
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=RuntimeWarning)
        after = [_step(model.train(), inputs)]
        if hasattr(model, "gradient_checkpointing_enable"):
            model.gradient_checkpointing_enable()
            after.append(_step(model, inputs))
            model.gradient_checkpointing_disable()
        assert torch.equal(model.eval().generate(**generate), said)
    for results in after:
        assert results.keys() == before.keys()
        for name, x in before.items():
            torch.testing.assert_close(results[name], x, msg=lambda m, name=name: f"{name}: {m}")
    handle.restore()
    for name, x in _step(model.train(), inputs).items():
        assert torch.equal(x, before[name]), name


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_open_flamingo_with_cached_media():
    """Text after cached media, as OpenFlamingo ranks answers: all of it sees the last of them."""
    torch.manual_seed(0)
    model, inputs, _ = _open_flamingo()
    for layer in model.lang_encoder.gated_cross_attn_layers:
        nn.init.constant_(layer.attn_gate, 0.7)
    model.eval()

    def answer() -> Tensor:
        model.cache_media(input_ids=inputs["lang_x"], vision_x=inputs["vision_x"])
        text = IDS[:, :5]
        out = model(vision_x=None, lang_x=text, attention_mask=torch.ones_like(text), clear_conditioned_layers=False)
        model.uncache_media()
        return out.logits

    expected = answer()
    fk.patch(model)
    torch.testing.assert_close(answer(), expected)
