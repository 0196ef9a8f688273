"""gated_cross_attention on Triton's kernels: see `_gpu/gated_cross_attention.py`."""

from functools import partial

from flamingo_kernels._gpu import gated_cross_attention
from flamingo_kernels.triton import _kernels

forward = partial(gated_cross_attention.forward, _kernels)
backward = partial(gated_cross_attention.backward, _kernels)
