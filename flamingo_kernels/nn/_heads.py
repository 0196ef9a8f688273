"""From the output of a projection to heads."""

from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., heads·D] to [..., heads, D], a view."""
    return x.unflatten(-1, (heads, x.shape[-1] // heads))


def split_keys_values(kv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """k and v, each [..., G, D], views of the output [..., 2·G·D] of one projection with the K rows first."""
    k, v = kv.chunk(2, dim=-1)
    return split_heads(k, heads), split_heads(v, heads)
