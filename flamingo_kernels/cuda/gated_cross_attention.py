"""gated_cross_attention on the kernels in CUDA C++: see `_gpu/gated_cross_attention.py`."""

from functools import partial

from flamingo_kernels._gpu import gated_cross_attention
from flamingo_kernels.cuda import _kernels
from flamingo_kernels.cuda._attention import MAX_HEAD_DIM

__all__ = ["MAX_HEAD_DIM", "backward", "forward"]

forward = partial(gated_cross_attention.forward, _kernels)
backward = partial(gated_cross_attention.backward, _kernels)
