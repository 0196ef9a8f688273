"""Tensors with poisoned memory around them, so that what a kernel touches beside them shows.

Sanitizers know where a tensor ends, but a stride can carry an access over what they watch into another tensor. These
margins are as wide as a kernel's tile: NaN, which spoils a result that reads it, and not to be written. With
AddressSanitizer, touching them is an error at once.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

MARGIN = 1 << 16  # bytes on either side
_FILL = 0xFF


class Margins:
    """Makes tensors with margins, and knows them."""

    def __init__(self) -> None:
        self.storages: list[tuple[Tensor, int, torch.dtype]] = []  # [margin, tensor, margin] as bytes; of the tensor
        self._process = ctypes.CDLL(None)

    def around(self, x: Tensor) -> Tensor:
        """A copy of a CPU tensor, with its strides."""
        return torch.empty_like(x, device="meta") if x.is_meta else self.like(x).copy_(x)

    def like(self, x: Tensor) -> Tensor:
        """Uninitialised, NaN where that exists, with the shape, strides and dtype of x."""
        elements = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        size = elements * x.element_size()
        storage = _empty(2 * MARGIN + size, dtype=torch.uint8)
        storage.fill_(_FILL)
        self.storages.append((storage, size, x.dtype))
        self._forbid(storage, size, "__asan_poison_memory_region")
        return storage[MARGIN : MARGIN + size].view(x.dtype).as_strided(x.shape, x.stride())

    def check(self) -> None:
        """Raises: AssertionError, if a margin of any of the tensors was written."""
        for storage, size, _ in self.storages:
            self._forbid(storage, size, "__asan_unpoison_memory_region")
            for name, margin in (("before", storage[:MARGIN]), ("behind", storage[MARGIN + size :])):
                written = (margin != _FILL).nonzero()
                assert not written.numel(), (
                    f"{written.numel()} bytes {name} a tensor of {size} bytes were written, the first of them "
                    f"at {int(written[0]) - (MARGIN if name == 'before' else 0):+d}"
                )
        self.storages.clear()

    def _forbid(self, storage: Tensor, size: int, function: str) -> None:
        if not hasattr(self._process, function):  # no AddressSanitizer in this process
            return
        start = storage.data_ptr()
        # behind: from the next multiple of 8, for what PyTorch's own vector code reads past the end
        for begin, end in ((start, start + MARGIN), (start + MARGIN + -(-size // 64) * 64, start + storage.numel())):
            getattr(self._process, function)(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin))


@contextlib.contextmanager
def margins() -> Iterator[Margins]:
    """Inside, what torch.empty, empty_like and new_empty make on the CPU has margins; at the end they are checked."""
    made = Margins()

    def guarded(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: object, **options: object) -> Tensor:
            x = real(*args, **options)
            return made.like(x) if x.device.type == "cpu" and not x.is_sparse else x

        return make

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, guarded(getattr(owner, name))))
        yield made
    made.check()


_empty = torch.empty
