"""How the attention kernels are launched: with the warps and stages of their tables, or with the fastest of a few.

FLAMINGO_KERNELS_AUTOTUNE=1, set before the first call, lets `triton.autotune` time the candidates on the device that is
there, once per kernel, dtype and tile, at the first lengths that come. It costs their compilation and some 100 ms each,
and cannot happen inside a CUDA graph, so run a step before. Tiles stay those of the tables: what the host allocates and
how many programs it starts depend on them. Kernels launched from here may run several times in place of once.
"""

import functools
import os
from typing import Any

import triton

_AUTOTUNE = os.environ.get("FLAMINGO_KERNELS_AUTOTUNE") == "1"


def launch(kernel: Any, programs: int, *arguments: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
    """kernel[(programs,)](*arguments, **constants) with these warps and stages, or with better ones."""
    if _AUTOTUNE:
        _autotuned(kernel, num_warps, num_stages)[(programs,)](*arguments, **constants)
    else:
        kernel[(programs,)](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)


def candidates(num_warps: int, num_stages: int) -> list[tuple[int, int]]:
    """Warps and stages to try: the table's; a stage more, for memory that answers late; twice the warps, for registers
    and latencies; and, in place of stages, room in shared memory for another block.
    """
    others = [(num_warps, num_stages + 1), (min(8, 2 * num_warps), num_stages), (num_warps, 1)]
    return list(dict.fromkeys([(num_warps, num_stages), *others]))


@functools.cache
def _autotuned(kernel: Any, num_warps: int, num_stages: int) -> Any:
    configs = [triton.Config({}, num_warps=w, num_stages=s) for w, s in candidates(num_warps, num_stages)]
    # the key has no lengths, for a step may have any
    return triton.autotune(configs, key=[parameter.name for parameter in kernel.params if parameter.is_constexpr])(
        kernel
    )
