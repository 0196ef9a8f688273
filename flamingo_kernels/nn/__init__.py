"""The modules of a Flamingo on the fused ops."""

from flamingo_kernels.nn.gated_cross_attention import GatedCrossAttentionBlock
from flamingo_kernels.nn.perceiver_resampler import PerceiverResampler

__all__ = ["GatedCrossAttentionBlock", "PerceiverResampler"]
