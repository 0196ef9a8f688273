"""gated_mlp on the kernels in CUDA C++: see `_gpu/gated_mlp.py`."""

from functools import partial

from flamingo_kernels._gpu import gated_mlp
from flamingo_kernels.cuda import _kernels

forward = partial(gated_mlp.forward, _kernels)
backward = partial(gated_mlp.backward, _kernels)
