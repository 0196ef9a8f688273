"""Tiny random language models of several families, a tokenizer of a few words, and Flamingos made of them."""

import copy
import dataclasses

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flamingo import Flamingo, FlamingoConfig, PromptTokenizer
from flamingo.digits import WORDS

VOCABULARY = ["<pad>", "<unk>", "<image>", "\n", *(f" {word}" for word in ("a", "handwritten", "big", *WORDS))]
WIDTH = 24  # of the visual features
CONFIG = FlamingoConfig(
    every=2, resampler_depth=1, resampler_heads=2, resampler_dim_head=8, latents=3, heads=2, dim_head=8
)
# a wide initialisation, so that the likeliest token leads by more than rounding
_SIZES = {"vocab_size": len(VOCABULARY), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_GROUPED = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    **_SIZES,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**_GROUPED), "model.layers"),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**_GROUPED), "model.layers"),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(head_dim=8, **_GROUPED), "model.layers"),
    "mpt": (
        MptForCausalLM,
        MptConfig(d_model=32, n_layers=4, n_heads=4, max_seq_len=128, initializer_range=0.4, **_SIZES),
        "transformer.blocks",
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=128, initializer_range=0.4, **_SIZES),
        "transformer.h",
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
            init_std=0.4,
            **_SIZES,
        ),
        "model.decoder.layers",
    ),
    "gpt_neox": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=128,
            initializer_range=0.4,
            **_SIZES,
        ),
        "gpt_neox.layers",
    ),
}


class FeaturesAsImages(nn.Module):
    """A vision encoder for tests whose images are features already."""

    dim = WIDTH

    def forward(self, images: Tensor) -> Tensor:
        return images


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def tiny_lm(family: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    kind, config, _ = FAMILIES[family]
    return kind(copy.deepcopy(config))


def tiny_flamingo(family: str = "llama", gates: float = 0.0, seed: int = 1, **changes) -> Flamingo:
    """A Flamingo whose gates, if it has any, are all opened to `gates`, in evaluation mode; `changes` are of CONFIG."""
    lm = tiny_lm(family)
    torch.manual_seed(seed)
    model = Flamingo(lm, FeaturesAsImages(), dataclasses.replace(CONFIG, **changes)).eval()
    for name, p in model.new_parameters().items():
        if name.endswith("_gate"):
            nn.init.constant_(p, gates)
    return model


def images(count: int, seed: int = 0) -> list[Tensor]:
    """Features [1 frame, 5 tokens, V]."""
    return list(torch.randn(count, 1, 5, WIDTH, generator=torch.Generator().manual_seed(seed)))


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\n|."), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="session")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(word_tokenizer())
