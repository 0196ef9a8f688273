"""A PTX interpreter: runs the compiled PTX of a GPU kernel on numpy arrays and CPU tensors, without a GPU.

    program = Program.parse(compiled.asm["ptx"])
    program.run(grid=(4,), arguments=[x, y, 1000, 0, 0], threads=128, shared_bytes=4096, seed=0)

The last two arguments of a Triton kernel are pointers to scratch memory: 0. With `triton_device.executed_on` Triton
itself compiles and launches whatever Python code launches, and nothing has to be said twice.

What is modelled, so that a mistake stops the run or makes its result wrong:

- Every instruction, modifier, type and number of operands is on a list, or parsing raises. Nothing runs as something
  similar, and no register is read as another type's width.
- An access must lie inside the one buffer that its pointer came from, and be aligned to its whole size. Messages name
  the line of the PTX and of the kernel's source, the buffer and the offset.
- Shared memory has the launched size and, like registers, holds NaN until it is written.
- Warps run one after the other between barriers, in an order that the seed draws, blocks in any order. A missing
  barrier therefore shows under some seed; a deadlock, and a warp that diverged where it must not, always.
- cp.async fills its target with NaN until the thread waits for its group. wgmma does so to its accumulators, and its
  tiles must still be the same at the wait.
- Integers wrap, floats are rounded once and keep subnormal numbers unless .ftz is there. tanh.approx is as rough as a
  chip's; the other approximations are exact to their last bits.

What is not:

- Lanes of a warp run in step, so a missing bar.warp.sync does not show. Nor do missing fences (wgmma.fence,
  fence.proxy.async) and weak memory order: a write is seen at once.
- Tensor cores sum in fp32 in numpy's order, and not in that of a chip, which truncates: compare with a tolerance.
- There is no TMA, mbarrier, tcgen05, atomic, cluster, local memory, function call or wgmma without swizzle. They raise.
- Time. Bank conflicts, occupancy and registers are not looked at.

An instruction costs some microseconds however many lanes run it, up to a few thousand. So a warp of many blocks, at
the same place in their code, is one array: in the tests here a launch takes 10 to 200 ms, less than its compilation.

Read in this order: parser (text to instructions), elementwise with integers, floats and conversions (the list), memory
and access, warp, matrix, wgmma, code (instructions to Python functions), machine (blocks, warps, barriers), program.
"""

from tests.ptx.parser import PtxError
from tests.ptx.program import Program

__all__ = ["Program", "PtxError"]
