"""The numbers that make a Flamingo out of a vision encoder and a language model, and the published ones."""

import dataclasses
import json
from typing import Any

from flamingo_kernels.intervals import ATTEND

CHOICES = {
    "attend": ATTEND,
    "cross_attention": ("gated", "ungated", "vanilla"),
    "resampler": ("perceiver", "mlp", "transformer"),
    "lm_weights": ("frozen", "tuned", "scratch"),
    "vision_weights": ("frozen", "tuned"),
}


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """A language model by its sizes.

    kind: `model_type` of transformers ("llama", "mpt", "opt", "gpt_neox", "gpt2", ...).
    ff_dim: width of the feed-forward; None: what transformers makes of the other sizes.
    more: further values of transformers' configuration.
    weights: name on the Hugging Face hub, or a folder; None: published nowhere.
    """

    kind: str
    layers: int
    dim: int
    heads: int
    vocabulary: int
    ff_dim: int | None = None
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: str | None = None


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A vision encoder by its sizes.

    kind: "vit", the one of `flamingo.vision`; "clip" or "siglip" of transformers; "timm" or "open_clip".
    name: of the model in timm or open_clip, whose sizes are theirs.
    cls: whether a class token comes along with the patches.
    weights: name on the Hugging Face hub, or a folder; of timm and open_clip their tag; None: no weights.
    """

    kind: str
    dim: int
    layers: int = 0
    heads: int = 0
    patch: int = 0
    resolution: int = 224
    name: str = ""
    cls: bool = False
    weights: str | None = None


@dataclasses.dataclass(frozen=True)
class FlamingoConfig:
    """Sizes of the new parts; the widths C and V come from the language model and the vision encoder.

    every, offset: a gated block stands before each language model layer idx >= offset with (idx - offset) % every == 0.
        The paper's offset is 0; OpenFlamingo's (idx + 1) % every == 0 is offset = every - 1.
    attend: which media a text token sees, as in `flamingo_kernels.media_intervals`.
    cross_attention: "gated" | "ungated", without tanh gates | "vanilla", without gates and without a feed-forward.
    heads, dim_head, ff_mult: attention and feed-forward width of the gated blocks.
    activation: of the feed-forwards in blocks and resampler, as in `fk.nn.GatedCrossAttentionBlock`.
    resampler: "perceiver" | "mlp" | "transformer".
    resampler_depth, resampler_heads, resampler_dim_head, resampler_ff_mult: its sizes.
    latents: R, tokens per media after the resampler.
    max_frames: frame embeddings of the resampler, interpolated where a video has more; None: it has none.
    lm_weights: "frozen" | "tuned", trained on from where they are | "scratch", drawn anew and trained.
    vision_weights: "frozen" | "tuned".
    language, vision: what `language.build_lm` and `vision.build_vision` build.

    Raises:
        ValueError: an unknown choice, or every or offset out of range.
    """

    every: int = 1
    offset: int = 0
    attend: str = "latest"
    cross_attention: str = "gated"
    heads: int = 8
    dim_head: int = 64
    ff_mult: int = 4
    activation: str = "squared_relu"
    resampler: str = "perceiver"
    resampler_depth: int = 6
    resampler_heads: int = 8
    resampler_dim_head: int = 64
    resampler_ff_mult: int = 4
    latents: int = 64
    max_frames: int | None = None
    lm_weights: str = "frozen"
    vision_weights: str = "frozen"
    language: LanguageConfig | None = None
    vision: VisionConfig | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"FlamingoConfig: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if self.every < 1 or self.offset < 0:
            raise ValueError(f"FlamingoConfig: every must be >= 1 and offset >= 0, got {self.every} and {self.offset}")

    def block_layers(self, layers: int) -> list[int]:
        """The layers, of so many, before which a block stands."""
        return list(range(self.offset, layers, self.every))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "FlamingoConfig":
        """What `to_json` wrote; fields that are not there keep their defaults.

        Raises:
            ValueError: a field that the configuration does not have.
        """
        values = json.loads(text)
        for name, kind in (("language", LanguageConfig), ("vision", VisionConfig)):
            if values.get(name) is not None:
                values[name] = _from_dict(kind, values[name])
        return _from_dict(cls, values)


def _from_dict(kind: type, values: dict[str, Any]) -> Any:
    unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(f"{kind.__name__}: unknown fields {unknown}")
    return kind(**values)


# The paper's language models (Chinchilla's family) and its NFNet have no public weights. Their stand-ins are GPT-NeoX,
# also a decoder with GELU and relative positions, and timm's NFNet-F6 (ImageNet's weights, not contrastive ones) up to
# its last stage, which is 1536 wide.
_NFNET = VisionConfig("timm", dim=1536, resolution=320, name="dm_nfnet_f6", weights="dm_in1k")
_CLIP = VisionConfig(
    "clip", dim=1024, layers=24, heads=16, patch=14, resolution=224, weights="openai/clip-vit-large-patch14"
)


def _paper(every: int, layers: int, dim: int) -> FlamingoConfig:
    """Table 5 of the paper: heads of 128 and squared ReLU; 8 frames are from its section 2.1."""
    language = LanguageConfig("gpt_neox", layers, dim, dim // 128, 32000, 4 * dim)
    return FlamingoConfig(
        every=every,
        heads=dim // 128,
        dim_head=128,
        resampler_heads=16,
        resampler_dim_head=96,
        max_frames=8,
        language=language,
        vision=_NFNET,
    )


def _open_flamingo(every: int, language: LanguageConfig) -> FlamingoConfig:
    return FlamingoConfig(every=every, offset=every - 1, activation="gelu", language=language, vision=_CLIP)


PRESETS = {
    "flamingo-3b": _paper(1, 24, 2048),
    "flamingo-9b": _paper(4, 40, 4096),
    "flamingo-80b": _paper(7, 80, 8192),
    "openflamingo-3b": _open_flamingo(
        1, LanguageConfig("mpt", 24, 2048, 16, 50368, weights="anas-awadalla/mpt-1b-redpajama-200b")
    ),
    "openflamingo-4b": _open_flamingo(
        2,
        LanguageConfig("gpt_neox", 32, 2560, 32, 50432, 10240, weights="togethercomputer/RedPajama-INCITE-Base-3B-v1"),
    ),
    "openflamingo-9b": _open_flamingo(4, LanguageConfig("mpt", 32, 4096, 32, 50432, weights="mosaicml/mpt-7b")),
    "flamingo-mini": FlamingoConfig(
        heads=16,
        dim_head=128,
        resampler_heads=16,
        resampler_dim_head=128,
        max_frames=4,
        # post-norm layers behind embeddings of 512, as OPT's 350M has them
        language=LanguageConfig(
            *("opt", 24, 1024, 16, 50272),
            more={"ffn_dim": 4096, "word_embed_proj_dim": 512, "do_layer_norm_before": False},
            weights="facebook/opt-350m",
        ),
        vision=dataclasses.replace(_CLIP, cls=True),
    ),
    "tiny": FlamingoConfig(
        every=2,
        heads=2,
        dim_head=16,
        resampler_depth=2,
        resampler_heads=2,
        resampler_dim_head=16,
        latents=8,
        max_frames=4,
        language=LanguageConfig("llama", 4, 64, 4, 512, 128),
        vision=VisionConfig("vit", dim=48, layers=2, heads=4, patch=8, resolution=32),
    ),
}
