"""Vision encoders of other packages, by what their models have and not by what they are called."""

import importlib
import types

import torch
from torch import Tensor, nn

from flamingo.config import VisionConfig
from flamingo.vision.vit import ViT, resize_positions


class VisionEncoder(nn.Module):
    """Images to tokens. Subclasses say what the tokens of a batch are.

    Args:
        model: the encoder.
        dim: V, the width of a token.
        cls: whether the tokens that stand before the patches (class, registers) come along.

    Raises:
        ValueError: `cls`, and the encoder has no such token.
    """

    def __init__(self, model: nn.Module, dim: int, cls: bool = False) -> None:
        super().__init__()
        self.model, self.dim, self.cls = model, dim, cls

    def forward(self, images: Tensor) -> Tensor:
        """[..., channels, height, width] -> [..., S, V]."""
        weight = next(self.model.parameters())
        prefix, patches = self.tokens(images.flatten(0, -4).to(weight.dtype))
        if self.cls and not prefix.shape[1]:
            raise ValueError(f"{type(self).__name__}: cls must be False, because the encoder gives patches alone")
        tokens = torch.cat([prefix, patches], dim=1) if self.cls else patches
        return tokens.unflatten(0, images.shape[:-3])

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[N, channels, height, width] -> what stands before the patches [N, n, V], and the patches [N, S, V]."""
        raise NotImplementedError

    def resize(self, resolution: int) -> None:
        """Take images of another resolution (pixels a side) from now on; interpolate position embeddings if any."""
        raise NotImplementedError


class HuggingFaceVision(VisionEncoder):
    """CLIP, SigLIP and others of transformers: the last hidden state of a vision model, or of a model that has one."""

    def __init__(self, model: nn.Module, cls: bool = False) -> None:
        model = model.vision_model if hasattr(model, "text_model") else model
        super().__init__(model, model.config.hidden_size, cls)

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        patch = self.model.config.patch_size
        patches = (images.shape[-2] // patch) * (images.shape[-1] // patch)
        tokens = self.model(pixel_values=images).last_hidden_state
        return tokens[:, : tokens.shape[1] - patches], tokens[:, tokens.shape[1] - patches :]

    def resize(self, resolution: int) -> None:
        config = self.model.config
        if resolution == config.image_size:
            return
        _resize_tables(self.model, config.image_size // config.patch_size, resolution // config.patch_size)
        for module in self.model.modules():
            if getattr(module, "image_size", None) == config.image_size:
                module.image_size = resolution
        config.image_size = resolution


class TimmVision(VisionEncoder):
    """Any model with timm's `forward_features`: convolutional nets, [N, V, h, w] or [N, h, w, V], and transformers.

    Args:
        dim: V; None: as the model says. An NFNet gives the width of its last stage instead, if that is asked for: the
            1x1 convolution behind it, which only widens, is then left out (as in the paper).
    """

    def __init__(self, model: nn.Module, dim: int | None = None, cls: bool = False) -> None:
        super().__init__(model, model.num_features if dim is None else dim, cls)
        if self.dim != model.num_features:
            if getattr(getattr(model, "final_conv", None), "in_channels", None) != self.dim:
                raise ValueError(f"TimmVision: dim must be {model.num_features}, the model's width, got {dim}")
            model.final_conv = nn.Identity()

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.forward_features(images)
        if tokens.ndim == 4:
            last = str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")
            tokens = tokens.flatten(1, 2) if last else tokens.flatten(2).transpose(1, 2)
            return tokens[:, :0], tokens
        prefix = self.model.num_prefix_tokens
        return tokens[:, :prefix], tokens[:, prefix:]

    def resize(self, resolution: int) -> None:
        if hasattr(self.model, "set_input_size"):  # transformers; a convolutional net takes any size
            self.model.set_input_size(img_size=resolution)


class OpenClipVision(VisionEncoder):
    """The image tower of an open_clip model: its patch tokens. (Towers made of timm models are for `TimmVision`.)"""

    def __init__(self, model: nn.Module) -> None:
        model = getattr(model, "visual", model)
        if not hasattr(model, "output_tokens"):
            raise ValueError(f"OpenClipVision: model must have an image tower that gives tokens, got {type(model)}")
        model.output_tokens = True
        super().__init__(model, model.conv1.out_channels)

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        _, tokens = self.model(images)
        return tokens[:, :0], tokens

    def resize(self, resolution: int) -> None:
        patch, _ = self.model.patch_size
        _resize_tables(self.model, self.model.grid_size[0], resolution // patch)
        self.model.image_size = (resolution, resolution)
        self.model.grid_size = (resolution // patch, resolution // patch)


def _resize_tables(model: nn.Module, old: int, new: int) -> None:
    """Position embeddings, and the indices that transformers keeps beside them."""
    for path, table in list(model.named_parameters()):
        owner_path, _, name = path.rpartition(".")
        if "position" not in path or table.ndim < 2 or table.shape[-2] - old**2 not in (0, 1):
            continue
        owner = model.get_submodule(owner_path)
        resized = resize_positions(table, old, new)
        setattr(owner, name, nn.Parameter(resized, requires_grad=table.requires_grad))
        if isinstance(owner, nn.Embedding):
            owner.num_embeddings = len(resized)
            holder = model.get_submodule(owner_path.rpartition(".")[0])
            holder.position_ids = torch.arange(len(resized), device=resized.device).expand(1, -1)


def build_vision(config: VisionConfig, pretrained: bool = False) -> VisionEncoder:
    """The encoder of a configuration, at random weights or with those that it names, for images of its resolution.

    Raises:
        ValueError: an unknown kind, or no weights are named.
        ModuleNotFoundError: timm or open_clip is not installed; says how.
    """
    if pretrained and config.weights is None:
        raise ValueError("build_vision: config must name its weights, got None")
    encoder = _build(config, pretrained)
    encoder.resize(config.resolution)
    return encoder


def _build(config: VisionConfig, pretrained: bool) -> VisionEncoder:
    if config.kind == "vit":
        sizes = (config.dim, config.layers, config.heads, config.patch, config.resolution)
        return TimmVision(ViT(*sizes, cls=config.cls), cls=config.cls)
    if config.kind in ("clip", "siglip"):
        from transformers import AutoConfig, AutoModel

        if pretrained:
            return HuggingFaceVision(AutoModel.from_pretrained(config.weights), config.cls)
        sizes = {"num_hidden_layers": config.layers, "num_attention_heads": config.heads, "patch_size": config.patch}
        sizes |= {"hidden_size": config.dim, "intermediate_size": 4 * config.dim, "image_size": config.resolution}
        model = AutoModel.from_config(AutoConfig.for_model(f"{config.kind}_vision_model", **sizes))
        return HuggingFaceVision(model, config.cls)
    if config.kind == "timm":
        name = f"{config.name}.{config.weights}" if pretrained else config.name
        model = _import("timm").create_model(name, pretrained=pretrained, num_classes=0)
        return TimmVision(model, config.dim, config.cls)
    if config.kind == "open_clip":
        model = _import("open_clip").create_model(config.name, pretrained=config.weights if pretrained else None)
        trunk = getattr(model.visual, "trunk", None)
        return OpenClipVision(model) if trunk is None else TimmVision(trunk, config.dim, config.cls)
    raise ValueError(f"build_vision: kind must be one of vit, clip, siglip, timm, open_clip, got {config.kind!r}")


def _import(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        needs = "pip install 'flamingo-kernels[vision]'"
        raise ModuleNotFoundError(f"build_vision: encoders of {name} need {error.name}: {needs}") from error
