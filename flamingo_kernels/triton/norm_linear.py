"""norm_linear on Triton's kernels: see `_gpu/norm_linear.py`."""

from functools import partial

from flamingo_kernels._gpu import norm_linear
from flamingo_kernels.triton import _kernels

forward = partial(norm_linear.forward, _kernels)
backward = partial(norm_linear.backward, _kernels)
