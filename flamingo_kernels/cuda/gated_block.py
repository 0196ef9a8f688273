"""gated_block on the kernels in CUDA C++: see `_gpu/gated_block.py`."""

from functools import partial

from flamingo_kernels._gpu import gated_block
from flamingo_kernels.cuda import _kernels

forward = partial(gated_block.forward, _kernels)
