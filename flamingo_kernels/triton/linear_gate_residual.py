"""linear_gate_residual on Triton's kernels: see `_gpu/linear_gate_residual.py`."""

from functools import partial

from flamingo_kernels._gpu import linear_gate_residual
from flamingo_kernels.triton import _kernels

forward = partial(linear_gate_residual.forward, _kernels)
backward = partial(linear_gate_residual.backward, _kernels)
