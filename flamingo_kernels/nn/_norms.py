"""The norms of both modules."""

from torch import Tensor, nn

EPS = 1e-5


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in the dtype of the weight: fp32 under autocast."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class LayerNorm(nn.LayerNorm):
    """(x - mean(x)) / sqrt(var(x) + eps) · weight + bias over the last dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=EPS)


NORMS = {"layer": LayerNorm, "rms": RMSNorm}
