"""The numbers that make a Flamingo out of a vision encoder and a language model."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class FlamingoConfig:
    """Sizes of the new parts; the widths C and V come from the language model and the vision encoder.

    every: a gated block stands before each language model layer idx with idx % every == 0 (the paper's n).
    attend: which media a text token sees, as in `flamingo_kernels.media_intervals`.
    resampler_depth, resampler_heads, resampler_dim_head: layers and attention of the Perceiver resampler.
    latents: R, tokens per media after the resampler.
    heads, dim_head, ff_mult: attention and feed-forward width of the gated blocks.
    """

    every: int = 1
    attend: str = "latest"
    resampler_depth: int = 6
    resampler_heads: int = 8
    resampler_dim_head: int = 64
    latents: int = 64
    heads: int = 8
    dim_head: int = 64
    ff_mult: int = 4
