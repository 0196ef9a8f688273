"""What stands between two matmuls, an activation and a tanh gate: csrc/cuda/activation.cuh says how."""

import torch
from torch import Tensor

from flamingo_kernels.cuda._module import module, stream_of
from flamingo_kernels.cuda._rows import address, array, rows

_NAMES = ("identity", "relu", "squared_relu", "silu", "gelu", "gelu_tanh", "swiglu")  # enum Activation
_NUMBERS = {name: number for number, name in enumerate(_NAMES)}


def activate(activation: str, h: Tensor, gate: Tensor | None) -> Tensor:
    """See `Kernels.activate`."""
    shape = _shape(activation, h)
    a = h.new_empty(shape)
    if a.numel():
        with torch.cuda.device_of(h):
            module().activation_forward(_NUMBERS[activation], *shape, rows(h), array(gate), a.data_ptr(), stream_of(h))
    return a


def backward(
    activation: str, da: Tensor | None, h: Tensor, gate: Tensor | None, *, dh: bool, a: bool, sums: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `Kernels.activation_backward`."""
    if not (dh or sums):
        return None, activate(activation, h, gate) if a else None, None
    shape = _shape(activation, h)
    out_dh = None
    if dh:
        in_place = activation != "swiglu" and da.dtype == h.dtype and da.is_contiguous()
        out_dh = da if in_place else h.new_empty(h.shape)
    out_a = h.new_empty(shape) if a else None
    part = h.new_empty((module().activation_blocks(*shape), 1), dtype=torch.float32) if sums else None
    if shape[0] and shape[1]:
        with torch.cuda.device_of(h):
            module().activation_backward(
                *(_NUMBERS[activation], *shape, rows(da), rows(h), array(gate)),
                *(address(out_dh), address(out_a), address(part), stream_of(h)),
            )
    return out_dh, out_a, part


def _shape(activation: str, h: Tensor) -> tuple[int, int]:
    return h.shape[0], h.shape[1] // 2 if activation == "swiglu" else h.shape[1]
