"""The settings and counters of an emulator inside a library."""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

_OBSERVER = ctypes.CFUNCTYPE(
    None,
    *(ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64),
)
ORDERS = ("random", "ascending", "descending")


class Emulator:
    """Of one library: `seed` and `order` draw the schedule of later launches; the rest says what launches did.

    The order is "random" (the default: drawn from the seed, one warp far ahead of others), "ascending" or "descending".
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.cusim_counter.restype = self._library.cusim_launch.restype = ctypes.c_char_p
        self._seed, self._order = 0, ORDERS[0]

    @property
    def seed(self) -> int:
        return self._seed

    @seed.setter
    def seed(self, value: int) -> None:
        self._configure(value, self._order)

    @property
    def order(self) -> str:
        return self._order

    @order.setter
    def order(self, value: str) -> None:
        if value not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {value!r}")
        self._configure(self._seed, value)

    def _configure(self, seed: int, order: str) -> None:
        self._seed, self._order = seed, order
        self._library.cusim_configure(ctypes.c_uint64(seed), ORDERS.index(order))

    def counters(self) -> dict[str, int]:
        """What the launches since the last `reset` did; counters.h says what each number is."""
        result, value = {}, ctypes.c_uint64()
        while name := self._library.cusim_counter(len(result), ctypes.byref(value)):
            result[name.decode()] = value.value
        return result

    def launches(self) -> dict[tuple[str, int, int], int]:
        """How often each (kernel with its types, threads of a block, bytes of shared memory) was launched."""
        result, threads, shared, times = {}, ctypes.c_uint(), ctypes.c_uint64(), ctypes.c_uint64()
        while kernel := self._library.cusim_launch(len(result), *map(ctypes.byref, (threads, shared, times))):
            result[kernel.decode(), threads.value, shared.value] = times.value
        return result

    @contextlib.contextmanager
    def observed(
        self, before: Callable[[str, tuple[int, ...], int, int, bytes], None], after: Callable[[], None]
    ) -> Iterator[None]:
        """Inside, before(kernel, grid, threads of a block, shared bytes, parameters) and after() each launch."""
        errors = []

        def call(kernel, grid, threads, shared, parameters, size) -> None:
            try:
                if kernel is None:
                    after()
                else:
                    before(kernel.decode(), tuple(grid[:3]), threads, shared, ctypes.string_at(parameters, size))
            except BaseException as error:  # ctypes would print it and go on
                errors.append(error)

        callback = _OBSERVER(call)
        self._library.cusim_observe(callback)
        try:
            yield
        finally:
            self._library.cusim_observe(_OBSERVER())
        if errors:
            raise errors[0]

    def reset(self) -> None:
        """Set every counter to zero, and forget the launches."""
        self._library.cusim_reset_counters()
