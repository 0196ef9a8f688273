"""A tanh gate in front of a residual, and its gradient per channel: csrc/cuda/gate.cuh says how."""

import torch
from torch import Tensor

from flamingo_kernels._gpu.rows import is_vector
from flamingo_kernels.cuda._module import module, stream_of
from flamingo_kernels.cuda._rows import array, rows


def add(residual: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """See `Kernels.add`."""
    return _scale(branch, gate, residual)


def scale(x: Tensor, gate: Tensor) -> Tensor:
    """See `Kernels.scale`."""
    return _scale(x, gate, None)


def _scale(x: Tensor, gate: Tensor | None, residual: Tensor | None) -> Tensor:
    y = x.new_empty(x.shape)
    if y.numel():
        with torch.cuda.device_of(x):
            module().gate_residual(
                *x.shape, rows(x), rows(residual), array(gate), is_vector(gate), y.data_ptr(), stream_of(x)
            )
    return y


def weight_gradients(p: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels.weight_gradients`."""
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(p):
        module().gate_backward(
            *(*weight.shape, p.data_ptr(), rows(weight), weight.stride(1)), array(gate), array(dgate), stream_of(p)
        )
    return p, dgate
