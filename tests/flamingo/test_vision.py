"""Vision encoders of several packages give patch tokens, are frozen, and take another resolution when fine-tuned.

timm and open_clip need torchvision, and with it a build of torch that fits. So here are stand-ins with their models'
interface; where a package can be imported, its own models are tested too.
"""

import dataclasses
import functools
import sys

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from flamingo import Flamingo, FlamingoConfig
from flamingo.config import PRESETS, VisionConfig
from flamingo.vision import HuggingFaceVision, OpenClipVision, TimmVision, VisionEncoder, ViT, build_vision
from flamingo.vision.vit import resize_positions
from tests.flamingo.conftest import CONFIG, tiny_lm

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"image_size": 32, "patch_size": 8}


class Convolutional(nn.Module):
    """As timm's NFNets: stages, and a last convolution that widens."""

    num_features = 24

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Conv2d(3, 12, 8, 8), nn.GELU())
        self.final_conv = nn.Conv2d(12, 24, 1)
        self.last = last
        self.output_fmt = "NHWC" if last else "NCHW"

    def forward_features(self, images: Tensor) -> Tensor:
        x = self.final_conv(self.stages(images))
        return x.permute(0, 2, 3, 1) if self.last else x


class ImageTower(nn.Module):
    """As open_clip's VisionTransformer: pooled output, or that and patch tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size, self.patch_size, self.grid_size = (32, 32), (8, 8), (4, 4)
        self.conv1 = nn.Conv2d(3, 32, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(32))
        self.positional_embedding = nn.Parameter(torch.randn(17, 32))
        self.output_tokens = False

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return (x[:, 0], x[:, 1:]) if self.output_tokens else x[:, 0]


def clip(**options) -> HuggingFaceVision:
    return HuggingFaceVision(CLIPVisionModel(CLIPVisionConfig(**SIZES)), **options)


def whole_clip() -> HuggingFaceVision:
    return HuggingFaceVision(CLIPModel(CLIPConfig(vision_config=SIZES, text_config={"hidden_size": 16} | SIZES)))


def open_clip_tower() -> OpenClipVision:
    model = nn.Module()
    model.visual = ImageTower()
    return OpenClipVision(model)


def real_timm(name: str, **options) -> TimmVision:
    timm = _import("timm")
    return TimmVision(timm.create_model(name, num_classes=0, img_size=32, **options))


def real_nfnet() -> TimmVision:
    model = _import("timm").create_model("dm_nfnet_f0", num_classes=0)
    return TimmVision(model, dim=1536)


def real_open_clip() -> OpenClipVision:
    from_package = _import("open_clip").transformer.VisionTransformer
    model = nn.Module()
    model.visual = from_package(image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2.0)
    return OpenClipVision(model)


def _import(name: str):
    try:
        return __import__(name)
    except Exception as reason:  # torchvision raises RuntimeError beside another torch than its own
        pytest.skip(f"{name} cannot be imported: {reason}")


# encoder, width, patches of an image of 32 x 32, whether a table of positions must be resized
ENCODERS = {
    "vit": (lambda: TimmVision(ViT(24, 2, 2, 8, 32)), 24, 16, True),
    "vit without its class token": (lambda: TimmVision(ViT(24, 2, 2, 8, 32, cls=True)), 24, 16, True),
    "vit with its class token": (lambda: TimmVision(ViT(24, 2, 2, 8, 32, cls=True), cls=True), 24, 17, True),
    "clip": (clip, 32, 16, True),
    "clip with its class token": (functools.partial(clip, cls=True), 32, 17, True),
    "clip of text and images": (whole_clip, 32, 16, True),
    "siglip": (lambda: HuggingFaceVision(SiglipVisionModel(SiglipVisionConfig(**SIZES))), 32, 16, True),
    "dinov2": (lambda: HuggingFaceVision(Dinov2Model(Dinov2Config(**SIZES))), 32, 16, True),
    "convolutional": (lambda: TimmVision(Convolutional()), 24, 16, False),
    "convolutional, channels last": (lambda: TimmVision(Convolutional(last=True)), 24, 16, False),
    "convolutional, last stage": (lambda: TimmVision(Convolutional(), dim=12), 12, 16, False),
    "image tower": (open_clip_tower, 32, 16, True),
    "timm vit": (lambda: real_timm("vit_tiny_patch16_224", patch_size=8, depth=2), 192, 16, True),
    "timm swin": (lambda: real_timm("swin_tiny_patch4_window7_224", window_size=4, depths=(1, 1, 1, 1)), 768, 1, False),
    "timm nfnet": (real_nfnet, 1536, 1, False),
    "open_clip vit": (real_open_clip, 32, 16, True),
}


@pytest.fixture(params=ENCODERS)
def case(request: pytest.FixtureRequest) -> tuple[VisionEncoder, int, int, bool]:
    torch.manual_seed(0)
    build, *expected = ENCODERS[request.param]
    return build().eval(), *expected


@torch.no_grad()
def test_images_become_tokens(case):
    encoder, dim, count, _ = case
    images = torch.rand(2, 3, 2, 3, 32, 32)
    features = encoder(images)
    assert features.shape == (2, 3, 2, count, dim)
    assert encoder.dim == dim
    torch.testing.assert_close(features[1, 2], encoder(images[1, 2]))
    assert not torch.allclose(features[0, 0], features[0, 1])


@torch.no_grad()
def test_a_patch_is_where_it_was(case):
    """Rows of the grid come one after another, with what stands before the patches in front."""
    encoder, _, count, _ = case
    if count == 1:
        pytest.skip("one token has one place")
    images = torch.zeros(2, 3, 32, 32)
    images[1, :, 8:16, 16:24] = 1  # the second row, the third column
    change = (encoder(images[1:]) - encoder(images[:1])).abs().sum(-1)[0]
    assert change[-16:].argmax() == 6


@torch.no_grad()
def test_a_higher_resolution_gives_more_tokens(case):
    encoder, _, count, has_positions = case
    frozen = nn.ModuleDict({"encoder": encoder}).requires_grad_(False)
    before = encoder(torch.full((1, 3, 32, 32), 0.5))
    encoder.resize(64)
    after = encoder(torch.full((1, 3, 64, 64), 0.5))
    extra = count % 2 if count > 1 else 0
    assert after.shape[1] == 4 * (count - extra) + extra
    assert all(not p.requires_grad for p in frozen.parameters())
    if has_positions:
        # of a uniform image tokens differ by position alone, and the new positions lie between the old ones
        grid = before[0, extra:].unflatten(0, (4, 4)).mean((0, 1)), after[0, extra:].unflatten(0, (8, 8)).mean((0, 1))
        assert torch.cosine_similarity(*grid, dim=0) > 0.8


def test_positions_are_interpolated_and_the_prefix_is_kept():
    table = torch.cat([torch.full((2, 3), 7.0), torch.arange(16.0)[:, None].expand(-1, 3)])
    resized = resize_positions(table, 4, 8)
    assert resized.shape == (2 + 64, 3)
    assert torch.equal(resized[:2], table[:2])
    grid = resized[2:, 0].unflatten(0, (8, 8))
    assert (grid.diff(dim=1) > 0).all()
    assert (grid.diff(dim=0) > 0).all()
    torch.testing.assert_close(grid.mean(), table[2:, 0].mean())
    torch.testing.assert_close(resize_positions(table, 4, 4), table)


def test_vision_is_frozen_until_it_is_not():
    torch.manual_seed(0)
    model = Flamingo(tiny_lm(), clip(), CONFIG).train()
    assert not model.encode(torch.rand(1, 1, 1, 3, 32, 32)).requires_grad
    assert not any(name.startswith("vision.") for name in model.new_parameters())
    model.unfreeze_vision(resolution=48)
    features = model.encode(torch.rand(1, 1, 1, 3, 48, 48))
    assert features.shape[-2] == 36
    features.square().mean().backward()
    learn = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("position_embedding" in name for name in learn)
    assert learn <= model.new_parameters().keys()
    assert learn <= model.new_state_dict().keys()


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_a_tuned_encoder_is_rebuilt_from_what_the_configuration_then_says(kind, tmp_path):
    torch.manual_seed(0)
    described = dataclasses.replace(PRESETS["tiny"].vision, kind=kind)
    if kind == "clip":
        build_vision(described).model.save_pretrained(tmp_path)
        described = dataclasses.replace(described, weights=str(tmp_path))
    pretrained = kind == "clip"
    config = dataclasses.replace(CONFIG, vision=described)
    model = Flamingo(tiny_lm(), build_vision(described, pretrained), config)
    model.unfreeze_vision(resolution=64)
    with torch.no_grad():
        for p in model.new_parameters().values():
            p.add_(torch.randn_like(p), alpha=0.1)
    again = FlamingoConfig.from_json(model.config.to_json())
    assert again.vision.resolution == 64
    twin = Flamingo(tiny_lm(), build_vision(again.vision, pretrained), again)
    twin.load_new_state_dict(model.new_state_dict())
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(twin.encode(x), model.encode(x))


def test_what_an_encoder_lacks_is_refused():
    with pytest.raises(ValueError, match="HuggingFaceVision: cls must be False"):
        HuggingFaceVision(SiglipVisionModel(SiglipVisionConfig(**SIZES)), cls=True)(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="TimmVision: dim must be 24, the model's width, got 13"):
        TimmVision(Convolutional(), dim=13)
    with pytest.raises(ValueError, match="OpenClipVision: model must have an image tower"):
        OpenClipVision(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="ViT: images must be 32 pixels"):
        TimmVision(ViT(24, 2, 2, 8, 32))(torch.rand(1, 3, 40, 40))


@pytest.mark.parametrize("kind", ["timm", "open_clip"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{kind} need {kind}: pip install 'flamingo-kernels\[vision\]'"):
        build_vision(VisionConfig(kind, dim=8, name="any"))
