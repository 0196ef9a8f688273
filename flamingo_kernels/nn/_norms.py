"""The norms of both modules, and those of others that compute the same."""

from torch import Tensor, nn

EPS = 1e-5
_RMS_OF_TRANSFORMERS = ("IdeficsRMSNorm", "MllamaTextRMSNorm")  # by name, for transformers need not be there


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


def describe(norm: nn.Module) -> tuple[str, float] | None:
    """ "layer" or "rms", and eps, of a norm over the last dimension with a full affine; None for any other module."""
    kind = type(norm)
    if kind in (LayerNorm, nn.LayerNorm):
        is_full = norm.weight is not None and norm.bias is not None and norm.weight.ndim == 1
        return ("layer", norm.eps) if is_full else None
    if kind is RMSNorm:
        return "rms", norm.eps
    if kind.__name__ in _RMS_OF_TRANSFORMERS and kind.__module__.startswith("transformers."):
        return "rms", norm.variance_epsilon
    return None
