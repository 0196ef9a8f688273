"""A thin Flamingo (arXiv 2204.14198): a frozen vision encoder, a Perceiver resampler, and a frozen language model with
gated cross-attention blocks between its layers, on the fused modules of flamingo_kernels."""

from flamingo.config import FlamingoConfig
from flamingo.model import Flamingo
from flamingo.prompt import Batch, Prompt, PromptTokenizer, collate

__all__ = ["Batch", "Flamingo", "FlamingoConfig", "Prompt", "PromptTokenizer", "collate"]
