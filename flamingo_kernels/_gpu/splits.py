"""How many blocks of threads share the keys of a tile of queries, and the parts that each of them leaves."""

import torch
from torch import Tensor

from flamingo_kernels._gpu.sizes import processors_of

_PROCESSORS = 108  # in place of a GPU's number of multiprocessors where there is no GPU


def splits_of(q: Tensor, blocks: int, key_blocks: int) -> int:
    """A power of two, as long as each block of threads gets a multiprocessor to itself.

    And two blocks of keys at least, since a part costs its writing and reading. From shapes alone: lengths are on the
    device. blocks: of threads, if none shared keys.
    """
    on_gpu = q.device.type == "cuda"
    processors = processors_of(q.device) if on_gpu else _PROCESSORS
    splits = 1
    while 2 * splits * blocks <= processors and 4 * splits <= key_blocks:
        splits *= 2
    return splits


def parts_of(x: Tensor, splits: int) -> Tensor:
    """Where `splits` results in fp32 go that become x; x itself for one."""
    return x if splits == 1 else torch.empty((splits, *x.shape), dtype=torch.float32, device=x.device)
