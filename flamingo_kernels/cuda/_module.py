"""The compiled module of CUDA C++ kernels, and what it takes in the place of tensors."""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor


@functools.cache  # for every launch asks
def module() -> ModuleType:
    """flamingo_kernels._cuda; ImportError where it was not built or cannot be loaded."""
    return importlib.import_module("flamingo_kernels._cuda")


def stream_of(x: Tensor) -> tuple[int, int]:
    """(device ordinal, address of its current stream); (-1, 0) for CPU tensors, which emulated kernels take."""
    device = x.get_device()
    return device, torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0
