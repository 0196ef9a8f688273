"""How tensors go to the kernels on rows (csrc/cuda/rows.h), and the sums over all rows."""

import torch
from torch import Tensor

from flamingo_kernels._gpu.kernels import Sum
from flamingo_kernels.cuda._module import module, stream_of

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Element
_NOTHING = 0, 0


def address(x: Tensor | None) -> int:
    """Of a contiguous tensor; 0 for None."""
    return 0 if x is None else x.data_ptr()


def array(x: Tensor | None) -> tuple[int, int]:
    """Address and type of a contiguous tensor."""
    return _NOTHING if x is None else (x.data_ptr(), _TYPES[x.dtype])


def rows(x: Tensor | None) -> tuple[int, int, int]:
    """Address, type and stride of [rows, C]."""
    return (*_NOTHING, 0) if x is None else (x.data_ptr(), _TYPES[x.dtype], x.stride(0))


def sum_rows(parts: list[Sum]) -> None:
    """See `Kernels.sum_rows`."""
    there = [each for each in parts if each[1].numel()]
    if there:
        first = there[0][0]
        sums = [(part.data_ptr(), *part.shape, array(out), array(gate)) for part, out, gate in there]
        with torch.cuda.device_of(first):
            module().row_sums(sums, stream_of(first))
