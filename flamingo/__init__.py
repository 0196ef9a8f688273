"""A thin Flamingo (arXiv 2204.14198): a frozen vision encoder, a Perceiver resampler, and a frozen language model with
gated cross-attention blocks between its layers, on the fused modules of flamingo_kernels."""

from flamingo.config import PRESETS, FlamingoConfig
from flamingo.model import Flamingo
from flamingo.prompt import Batch, Example, Prompt, PromptTokenizer, Shot, collate, few_shot

__all__ = [
    "PRESETS",
    "Batch",
    "Example",
    "Flamingo",
    "FlamingoConfig",
    "Prompt",
    "PromptTokenizer",
    "Shot",
    "collate",
    "few_shot",
]
