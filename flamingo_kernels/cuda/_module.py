"""The compiled module of CUDA C++ kernels, and what it takes in the place of tensors."""

import importlib
from types import ModuleType

import torch
from torch import Tensor


def module() -> ModuleType:
    """flamingo_kernels._cuda; ImportError where it was not built or cannot be loaded."""
    return importlib.import_module("flamingo_kernels._cuda")


def stream_of(x: Tensor) -> tuple[int, int]:
    """(device ordinal, address of its current stream); (-1, 0) for CPU tensors, which emulated kernels take."""
    if x.device.type == "cpu":
        return -1, 0
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream
