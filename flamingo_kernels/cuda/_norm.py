"""LayerNorm and RMSNorm over rows: csrc/cuda/norm.cuh says how."""

import torch
from torch import Tensor

from flamingo_kernels.cuda._module import module, stream_of
from flamingo_kernels.cuda._rows import address, array, rows


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    dtype: torch.dtype,
    copy: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `Kernels.normalize`."""
    _, z, copied = _forward(x, None, None, weight, bias, norm, eps, dtype, copy)
    return z, copied


def add_normalize(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    dtype: torch.dtype,
    copy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels.add_normalize`."""
    return _forward(residual, branch, gate, weight, bias, norm, eps, dtype, copy)


def _forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    dtype: torch.dtype,
    copy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(0 if branch is None else x.shape)
    z = x.new_empty(x.shape, dtype=dtype)
    copied = x.new_empty(x.shape if copy else 0)
    if x.numel():
        inputs = rows(x), rows(branch), array(gate), array(weight), array(bias)
        outputs = y.data_ptr(), array(z), copied.data_ptr()
        with torch.cuda.device_of(x):
            module().norm_forward(*x.shape, *inputs, *outputs, eps, norm == "layer", stream_of(x))
    return y, z, copied


def backward(
    dz: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    *,
    residual: Tensor | None,
    dx: bool,
    z: torch.dtype | None,
    sums: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """See `Kernels.norm_backward`."""
    out_dx = x.new_empty(x.shape) if dx else None
    out_z = None if z is None else x.new_empty(x.shape, dtype=z)
    inputs = *x.shape, rows(dz), rows(x), rows(residual), array(weight), array(bias)
    with torch.cuda.device_of(x):
        blocks = module().norm_backward_blocks(*inputs, stream_of(x)) if sums and x.numel() else 0
        parts = [x.new_empty((blocks, x.shape[1]), dtype=torch.float32) for _ in range(2 if sums else 0)]
        if x.numel():
            outputs = address(out_dx), array(out_z), *(map(address, parts or (None, None)))
            module().norm_backward(*inputs, *outputs, eps, norm == "layer", stream_of(x))
    return out_dx, out_z, parts
