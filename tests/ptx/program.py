"""The interface: a kernel parsed once, and run on arrays."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tests.ptx.code import Code
from tests.ptx.machine import Launch, grid_of
from tests.ptx.memory import Global, parameter_bytes
from tests.ptx.parser import PtxError, parse
from tests.ptx.warp import LANES

Argument = np.ndarray | torch.Tensor | int | float


class Program:
    """The kernel of one PTX module, ready to run."""

    def __init__(self, code: Code) -> None:
        self.code = code

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def parse(ptx: str) -> "Program":
        """Raises: PtxError, naming the line, for anything that the interpreter does not know."""
        return Program(Code(parse(ptx)))

    def run(
        self,
        grid: Sequence[int],
        arguments: Sequence[Argument] | Mapping[str, Argument],
        *,
        threads: int,
        shared_bytes: int = 0,
        seed: int | None = None,
    ) -> None:
        """Run every block of a grid, in place on the arguments' own memory.

        arguments: in the order of the kernel's parameters, with names for the messages if it is a mapping. An array or
            a CPU tensor, of any dtype and strides, is passed as a pointer to its first element, and what the kernel may
            access through that pointer are the bytes from the first to the last element of the array.
        threads: of a block, a multiple of 32.
        seed: of the order of blocks and warps. None runs all warps in step, which is faster, and hides a missing
            barrier.

        Raises:
            PtxError: naming the line of the PTX and that of the kernel's source, where a chip would do something else
                or something undefined: an access outside of a buffer or misaligned, warps that diverge where they must
                not, a deadlock.
        """
        kernel = self.code.kernel
        if threads % LANES or (kernel.threads and threads != kernel.threads):
            raise PtxError(f"threads must be {kernel.threads or 'a multiple of 32'}, got {threads}")
        named = arguments if isinstance(arguments, Mapping) else {f"argument {i}": x for i, x in enumerate(arguments)}
        if len(named) != len(kernel.parameters):
            raise PtxError(f"{kernel.name} has {len(kernel.parameters)} parameters, got {len(named)} arguments")
        memory = Global()
        values = [
            parameter_bytes(parameter.type, _pass(memory, name, argument), name)
            for parameter, (name, argument) in zip(kernel.parameters, named.items(), strict=True)
        ]
        Launch(self.code, grid_of(grid), threads, shared_bytes, values, memory, seed).run()


def _pass(memory: Global, name: str, argument: Argument) -> int | float:
    if isinstance(argument, np.ndarray):
        argument = torch.from_numpy(argument)
    return memory.add(name, extent(argument)) if isinstance(argument, torch.Tensor) else argument


def extent(x: torch.Tensor) -> np.ndarray:
    """The memory from a tensor's first element to its last, as bytes."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.detach().as_strided((last + 1,), (1,), x.storage_offset()).view(torch.uint8).numpy()
