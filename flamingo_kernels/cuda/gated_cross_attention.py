"""gated_cross_attention on the kernels in CUDA C++: see `_gpu/gated_cross_attention.py`."""

from functools import partial

from flamingo_kernels._gpu import gated_cross_attention
from flamingo_kernels.cuda import _kernels

forward = partial(gated_cross_attention.forward, _kernels)
backward = partial(gated_cross_attention.backward, _kernels)
