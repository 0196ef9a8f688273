"""The model shapes every op is measured at."""

from typing import NamedTuple

LATENTS = 64  # key positions per media


class Shape(NamedTuple):
    """One layer of a model: B rows, T text tokens, M media per row, H heads of D, widths C and V."""

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

    @property
    def keys(self) -> int:
        return self.media * LATENTS

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
        Shape("idefics9b", 1, 1024, 10, 32, 128, 4096, 1280),
        Shape("shots32", 1, 2048, 33, 8, 64, 2048, 1024),
        Shape("decode32", 3, 1, 33, 8, 64, 2048, 1024, beams=3, trains=False),
        Shape("mini", 8, 128, 2, 16, 128, 1024, 1024),
    )
}
