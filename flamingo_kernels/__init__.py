"""Fused kernels for Flamingo (arXiv 2204.14198): masked gated cross-attention and the Perceiver resampler."""

from flamingo_kernels import nn
from flamingo_kernels._backends import backends, use_backend
from flamingo_kernels.intervals import Intervals, media_intervals
from flamingo_kernels.ops.gated_mlp import gated_mlp
from flamingo_kernels.ops.latent_attention import latent_attention
from flamingo_kernels.ops.linear_gate_residual import linear_gate_residual
from flamingo_kernels.ops.masked_cross_attention import masked_cross_attention
from flamingo_kernels.ops.media_kv import media_kv
from flamingo_kernels.ops.norm_linear import norm_linear
from flamingo_kernels.patch import convert_state_dict, patch

__version__ = "0.1.0"

__all__ = [
    "Intervals",
    "backends",
    "convert_state_dict",
    "gated_mlp",
    "latent_attention",
    "linear_gate_residual",
    "masked_cross_attention",
    "media_intervals",
    "media_kv",
    "nn",
    "norm_linear",
    "patch",
    "use_backend",
]
