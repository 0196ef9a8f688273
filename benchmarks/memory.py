"""Memory of one call, in bytes of tensor storage."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that is allocated at once during a call beyond what was there before; its results count.

    On the CPU this follows each allocation that PyTorch's allocator reports to the profiler, those of C++ code
    included. Scratch that a library gets elsewhere (MKL, oneDNN) is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def saved_bytes(
    run: Callable[..., Tensor], leaves: Sequence[Tensor], constants: Sequence[Tensor] = ()
) -> tuple[int, int]:
    """What a forward keeps for its backward: (bytes besides the inputs, bytes of the inputs), each storage once.

    The inputs are the leaves, which `run` is called with, and the constants, which it reads all the same.

    On any device, meta too, where nothing is computed and no storage has a data pointer.
    """
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = run(*leaves)  # held until all are counted, so that no storage is freed and its address reused
    inputs = {x.untyped_storage()._cdata for x in (*leaves, *constants)}
    of_inputs = sum(size for storage, size in storages.items() if storage in inputs)
    del output
    return sum(storages.values()) - of_inputs, of_inputs
