"""A norm's affine folded into the weight behind it, and the gradients of both: csrc/cuda/fold.cuh says how."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flamingo_kernels.cuda._module import module, stream_of
from flamingo_kernels.cuda._rows import address, array, rows


def fold(weight: Tensor, scale: Tensor, bias: Tensor, folded: Tensor, offset: Tensor) -> None:
    """See `Kernels.fold`."""
    with torch.cuda.device_of(weight):
        module().fold(
            *(*weight.shape, rows(weight), weight.stride(1), array(scale), array(bias)),
            *(folded.data_ptr(), offset.data_ptr(), stream_of(weight)),
        )


def unfold(
    p: Tensor, s: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `Kernels.unfold`."""
    of_weight, of_scale, of_bias = wanted
    dweight = dscale = dbias = None
    if of_weight:
        dweight = p if p.dtype == weight.dtype else weight.new_empty(weight.shape)
    if of_scale:
        dscale = torch.empty_like(scale)
    if of_bias:
        dbias = torch.empty_like(bias)
    with torch.cuda.device_of(p):
        module().unfold(
            *(*weight.shape, array(p), s.data_ptr(), rows(weight), weight.stride(1), array(scale), array(bias)),
            *(address(dweight), array(dscale), array(dbias), stream_of(p)),
        )
    return dweight, dscale, dbias
