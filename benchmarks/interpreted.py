"""What Triton kernels load, store and multiply, counted in Triton's interpreter.

Counted are active lanes: a masked-out element costs nothing. Floating point arithmetic is left out or made coarse, for
it is slow in the interpreter and decides nothing: addresses and masks come from integers. A launch with the kernel,
grid, shapes, scalars and integers in memory of one before is not run again.
"""

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_COMPUTE_CAPABILITY = 90  # whose compiler is asked what it specialises on


class Block(NamedTuple):
    """A tensor that a kernel was given, without keeping it: autograd copies a gradient that somebody holds."""

    address: int
    bytes: int


class Counts(NamedTuple):
    """Of one launch, as in `accounting.Launch`."""

    read: int
    written: int
    unique_read: int
    unique_written: int
    flops: int


@dataclass
class _Memory:
    """One storage: which of its elements of `size` bytes were read and written."""

    base: int
    end: int
    size: int

    def __post_init__(self) -> None:
        self.read, self.written = (np.zeros((self.end - self.base) // self.size, bool) for _ in range(2))

    @property
    def read_bytes(self) -> int:
        return self.size * int(np.count_nonzero(self.read))

    @property
    def written_bytes(self) -> int:
        return self.size * int(np.count_nonzero(self.written))


Done = Callable[[str, Counts, dict[str, Any], tuple], None]  # name, counts, arguments, specialization


@contextlib.contextmanager
def hooks(done: Done, processors: int) -> Iterator[None]:
    """Inside, `done` is told of every launch of a Triton kernel. Nothing happens in a process that does not interpret.

    Host code does as on a GPU with that many multiprocessors: it shares work among those, and it does not check the
    contents of tensors, which would be launches that a GPU never sees.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    from flamingo_kernels._gpu import splits
    from flamingo_kernels.triton import _norm, latent_attention, masked_cross_attention

    builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
    counting = _Counting(done)
    patches = [
        (function, "run", counting.around(function.run)),
        (function, "__call__", counting.caller()),
        (builder, "create_masked_load", counting.around_load(builder.create_masked_load)),
        (builder, "create_masked_store", counting.around_store(builder.create_masked_store)),
        (builder, "create_dot", counting.dot),
        (builder, "create_erf", lambda self, x: x),
        (interpreter, "_convert_float", _convert(interpreter._convert_float)),
        (_norm, "programs_for_rows", lambda x, tiles: min(tiles, 2 * processors)),
        (splits, "_PROCESSORS", processors),
    ]
    patches += [(op, "_check", lambda *_: None) for op in (masked_cross_attention, latent_attention)]
    patches += [(builder, name, _refuse) for name in ("create_atomic_rmw", "create_atomic_cas", "create_dot_scaled")]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    try:
        for owner, name, member in patches:
            setattr(owner, name, member)
        yield
    finally:
        for owner, name, member in before:
            setattr(owner, name, member)


class _Counting:
    """The hooks' state: the launch that is running, and the memory it may touch."""

    def __init__(self, done: Done) -> None:
        self._done = done
        self._kernel = ""
        self._memories: list[_Memory] = []
        self._patched: set[str] = set()
        self._read = self._written = self._flops = 0

    def around(self, run: Callable) -> Callable:
        def counted_run(kernel: Any, *args: Any, grid: tuple, warmup: bool, **kwargs: Any) -> None:
            arguments = _bind(kernel.fn, args, kwargs)
            with _disable_current_modes(), np.errstate(all="ignore"):
                key, integers = _key(kernel, grid, arguments), _integers(arguments)
                if key in _known:
                    counts, after = _known[key]
                    for x, result in zip(integers, after, strict=True):
                        x.copy_(result)
                else:
                    counts = self._count(
                        kernel, arguments, lambda: run(kernel, *args, grid=grid, warmup=warmup, **kwargs)
                    )
                    _known[key] = counts, [x.clone() for x in integers]
            blocks = {name: _block(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}
            self._done(kernel.fn.__name__, counts, blocks, _specialization(kernel, args, kwargs))

        return counted_run

    def _count(self, kernel: Any, arguments: dict[str, Any], run: Callable[[], None]) -> Counts:
        self._kernel, self._memories = kernel.fn.__name__, _memories(arguments)
        self._read = self._written = self._flops = 0
        self._patched.clear()
        run()
        unique = (sum(getattr(m, f"{how}_bytes") for m in self._memories) for how in ("read", "written"))
        return Counts(self._read, self._written, *unique, self._flops)

    def caller(self) -> Callable:
        """Calls a function for a kernel. Triton's own patches the language in each call, which takes milliseconds; once
        in a launch for each module is enough.
        """

        def call(function: Any, *args: Any, **kwargs: Any) -> Any:
            if function.fn.__module__ not in self._patched:
                from triton.runtime.interpreter import _patch_lang

                self._patched.add(function.fn.__module__)
                _patch_lang(function.fn)
            return function.rewrite()(*args, **kwargs)

        return call

    def around_load(self, load: Callable) -> Callable:
        def counted_load(builder: Any, ptrs: Any, mask: Any, *others: Any) -> Any:
            self._read += self._touch(ptrs, mask, "read")
            return load(builder, ptrs, mask, *others)

        return counted_load

    def around_store(self, store: Callable) -> Callable:
        def counted_store(builder: Any, ptrs: Any, value: Any, mask: Any, *others: Any) -> Any:
            self._written += self._touch(ptrs, mask, "written")
            return store(builder, ptrs, value, mask, *others)

        return counted_store

    def dot(self, a: Any, b: Any, accumulator: Any, *_: Any) -> Any:
        """No product, but its 2·M·N·K operations."""
        self._flops += 2 * a.data.size * b.data.shape[-1]
        return accumulator

    def _touch(self, ptrs: Any, mask: Any, how: str) -> int:
        """Marks what the active lanes of one load or store touch; returns their bytes."""
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)]  # a splat one is int32
        if addresses.size:
            first, last = int(addresses.min()), int(addresses.max()) + size
            memory = next((m for m in self._memories if m.base <= first and last <= m.end), None)
            if memory is None:
                raise IndexError(f"{self._kernel} reaches {first}..{last}, which is in none of its tensors")
            at = (addresses - np.uint64(memory.base)).view(np.int64) // memory.size
            for i in range(size // memory.size):
                getattr(memory, how)[at + i] = True
        return addresses.size * size


_known: dict[tuple, tuple[Counts, list[Tensor]]] = {}  # with the integers as the launch left them


def _bind(fn: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names of a kernel's parameters; launch options are none of them."""
    signature = inspect.signature(fn)
    return signature.bind(*args, **{name: x for name, x in kwargs.items() if name in signature.parameters}).arguments


def _block(x: Tensor) -> Block:
    return Block(x.data_ptr(), x.numel() * x.element_size())


def _integers(arguments: dict[str, Any]) -> list[Tensor]:
    return [x for x in arguments.values() if isinstance(x, Tensor) and not x.is_floating_point()]


def _key(kernel: Any, grid: tuple, arguments: dict[str, Any]) -> tuple:
    """Equal for launches that count alike: all but the addresses of tensors and what they hold, integers apart."""
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    storages = list(dict.fromkeys(x.untyped_storage().data_ptr() for x in tensors))

    def of(x: Any) -> object:
        if not isinstance(x, Tensor):
            return x
        storage = x.untyped_storage()
        place = storages.index(storage.data_ptr()), storage.nbytes(), x.storage_offset()
        return *place, x.dtype, tuple(x.shape), x.stride()

    contents = tuple(x.contiguous().numpy().tobytes() for x in _integers(arguments))
    return kernel.fn, grid, tuple(map(of, arguments.values())), contents


def _memories(arguments: dict[str, Any]) -> list[_Memory]:
    """The storages of the arguments. Elements are as small as the smallest that an argument has there."""
    sizes: dict[tuple[int, int], int] = {}
    for x in arguments.values():
        if isinstance(x, Tensor) and x.untyped_storage().nbytes():
            base = x.untyped_storage().data_ptr()
            span = base, base + x.untyped_storage().nbytes()
            sizes[span] = min(sizes.get(span, x.element_size()), x.element_size())
    return [_Memory(*span, size) for span, size in sizes.items()]


def _specialization(kernel: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """Triton's own key: dtypes, constexprs, launch options, and which integers are 1 or divisible by 16."""
    _, values, options = _binder(kernel)(*args, **kwargs)
    return kernel.fn.__name__, tuple(map(str, values)), str(sorted(options.items()))


@functools.cache
def _binder(kernel: Any) -> Callable:
    """What a compiled kernel would call at each launch to look for its binary."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    function = JITFunction(kernel.fn, **kernel.kwargs)
    backend = make_backend(GPUTarget("cuda", _COMPUTE_CAPABILITY, 32))
    return create_function_from_signature(function.signature, function.params, backend)


def _convert(convert: Callable) -> Callable:
    """bf16 and fp32 into each other by their upper halves; everything else as it was."""
    import triton.language as tl

    def converted(x: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.bfloat16, tl.float32):
            return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if (source, target) == (tl.float32, tl.bfloat16):
            return (np.ascontiguousarray(x).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        return convert(x, source, target, rounding)

    return converted


def _refuse(*_: Any) -> None:
    raise NotImplementedError("accounting: atomics and scaled dots are not counted")
