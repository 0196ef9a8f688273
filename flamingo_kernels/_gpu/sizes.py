"""Sizes of grids and tiles, which host code asks for in every call.

`triton.cdiv` and `triton.next_power_of_2` are for kernels as well, and take ten times as long.
"""

import functools

import torch


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest one that is n or more; n at least 1."""
    return 1 << (n - 1).bit_length()


@functools.cache  # a device's properties are copied, names and all, whenever they are asked for
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
