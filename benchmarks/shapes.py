"""The model shapes everything is measured at."""

from typing import NamedTuple

LATENTS = 64  # key positions per media, and what a resampler gives


class Shape(NamedTuple):
    """One layer of a model: B rows, T text tokens, M media per row, H heads of D, widths C, V and F."""

    name: str
    rows: int
    tokens: int
    media: int
    heads: int
    head_dim: int
    width: int
    visual_width: int
    beams: int = 1  # rows that share one row of keys
    trains: bool = True
    ff_width: int = 0  # 0: 4·C
    activation: str = "gelu"  # OpenFlamingo's, so that every package computes the same; the paper's is squared_relu

    @property
    def keys(self) -> int:
        return self.media * LATENTS

    @property
    def F(self) -> int:
        return self.ff_width or 4 * self.width

    def __str__(self) -> str:
        beams = f" ({self.beams} beams share keys)" if self.beams > 1 else ""
        return (
            f"{self.name}: B={self.rows}{beams} T={self.tokens} M={self.media} "
            f"H×D={self.heads}×{self.head_dim} C={self.width} V={self.visual_width}"
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("of3b", 8, 256, 6, 8, 64, 2048, 1024),
        Shape("of9b", 2, 256, 6, 8, 64, 4096, 1024),
        Shape("flamingo3b", 4, 256, 5, 16, 128, 2048, 1536),
        Shape("idefics9b", 1, 1024, 10, 32, 128, 4096, 1280, ff_width=11008, activation="swiglu"),
        Shape("shots32", 1, 2048, 33, 8, 64, 2048, 1024),
        Shape("decode32", 3, 1, 33, 8, 64, 2048, 1024, beams=3, trains=False),
        Shape("mini", 8, 128, 2, 16, 128, 1024, 1024),
    )
}


class ResamplerShape(NamedTuple):
    """A resampler of `depth` layers over N media of S tokens each, of which `lengths` are valid, H heads of D."""

    name: str
    media: int
    tokens: int
    width: int
    heads: int
    head_dim: int
    lengths: tuple[int, ...] = ()  # valid tokens of each media, the first ones; empty: all
    depth: int = 6

    @property
    def valid(self) -> tuple[int, ...]:
        return self.lengths or (self.tokens,) * self.media

    def __str__(self) -> str:
        tokens = "/".join(map(str, self.lengths)) or str(self.tokens)
        return (
            f"{self.name}: N={self.media} S={tokens} V={self.width} H×D={self.heads}×{self.head_dim} "
            f"R={LATENTS} depth={self.depth}"
        )


RESAMPLER_SHAPES = {
    shape.name: shape
    for shape in (
        ResamplerShape("image", 1, 256, 1024, 8, 64),
        ResamplerShape("img", 16, 256, 1024, 8, 64),
        ResamplerShape("clip257", 16, 257, 1024, 8, 64),
        ResamplerShape("video8", 1, 2048, 1024, 8, 64),
        ResamplerShape("paper", 4, 800, 1536, 16, 96),
        ResamplerShape("masked", 4, 1024, 1024, 8, 64, lengths=(1024, 771, 256, 64)),
    )
}
