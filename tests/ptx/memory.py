"""Global, shared and parameter memory: who owns an address, and whether an access stays inside and is aligned.

A global pointer holds the number of its buffer in its upper bits, so arithmetic that leaves a buffer shows, and the
message can name the buffer and the offset. Shared memory is a copy per block of exactly the size that was launched,
filled with bytes 0xFF, which are NaN in every float format, and begins at an address other than 0.
"""

from typing import NamedTuple

import numpy as np

from tests.ptx.formats import DTYPES
from tests.ptx.parser import Instruction, PtxError
from tests.ptx.races import Races

POISON = 0xFF
SHARED_BASE = 1024  # where shared memory begins; aligned as the matrix descriptors' swizzles want it
PARAMETER_BITS = 16  # of a byte's place in a parameter; the bits above number the parameters
_BUFFER_BITS = 44  # bytes that pointer arithmetic may wander before it names another buffer
_ALIGNMENT = 256  # the device's address and the host's agree in these low bits
# what is moved at once, by its bytes; 16 have no integer dtype, and are moved, never computed with
_WORDS = {1: DTYPES["u8"], 2: DTYPES["u16"], 4: DTYPES["u32"], 8: DTYPES["u64"], 16: np.dtype(np.complex128)}


class Buffer(NamedTuple):
    """bytes: a flat view of the memory itself. base: the device's address of its first byte."""

    name: str
    bytes: np.ndarray
    base: int


class Global:
    """The buffers of one launch. Loads and stores work on the arrays' own memory."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.words: dict[tuple[int, int], tuple[np.ndarray, int]] = {}

    def add(self, name: str, data: np.ndarray) -> int:
        """The address that a kernel gets for a flat uint8 array."""
        base = (len(self.buffers) + 1 << _BUFFER_BITS) + (1 << _BUFFER_BITS - 1) + data.ctypes.data % _ALIGNMENT
        self.buffers.append(Buffer(name, data, base))
        return base

    def load(self, addresses: np.ndarray, size: int, ins: Instruction) -> np.ndarray:
        """Words of `size` bytes at int64 addresses [n]."""
        word = _WORDS[size]
        number = self._only(addresses, size)
        if number is not None:
            view, start = self._view(number, size)
            self._check_alignment(addresses, size, ins)
            return view[(addresses - start) // size]
        result = np.empty(addresses.shape, word)
        for number, lanes in self._split(addresses, size, ins):
            view, start = self._view(number, size)
            result[lanes] = view[(addresses[lanes] - start) // size]
        return result

    def store(self, addresses: np.ndarray, values: np.ndarray, ins: Instruction) -> None:
        size = values.dtype.itemsize
        number = self._only(addresses, size)
        if number is not None:
            view, start = self._view(number, size)
            self._check_alignment(addresses, size, ins)
            view[(addresses - start) // size] = values
            return
        for number, lanes in self._split(addresses, size, ins):
            view, start = self._view(number, size)
            view[(addresses[lanes] - start) // size] = values[lanes]

    def _view(self, number: int, size: int) -> tuple[np.ndarray, int]:
        """A buffer as words from its first aligned address on, and that address."""
        if (number, size) not in self.words:
            buffer = self.buffers[number]
            skipped = -buffer.base % size
            whole = max(buffer.bytes.size - skipped, 0) // size * size
            view = buffer.bytes[skipped : skipped + whole].view(_WORDS[size])
            self.words[number, size] = view, buffer.base + skipped
        return self.words[number, size]

    def _only(self, addresses: np.ndarray, size: int) -> int | None:
        """The one buffer that holds every access, as nearly always."""
        number = (int(addresses[0]) >> _BUFFER_BITS) - 1
        if not 0 <= number < len(self.buffers):
            return None
        buffer = self.buffers[number]
        inside = addresses.min() >= buffer.base and addresses.max() + size <= buffer.base + buffer.bytes.size
        return number if inside else None

    def _split(self, addresses: np.ndarray, size: int, ins: Instruction):
        """Each buffer's number with the lanes that access it.

        Raises: PtxError, for an access outside of every buffer.
        """
        numbers = (addresses >> _BUFFER_BITS) - 1
        for number in np.unique(numbers):
            lanes = numbers == number
            at = addresses[lanes]
            if not 0 <= number < len(self.buffers):
                raise ins.error(f"address {int(at[0]):#x} belongs to no buffer")
            buffer = self.buffers[number]
            offsets = at - buffer.base
            outside = (offsets < 0) | (offsets + size > buffer.bytes.size)
            if outside.any():
                raise ins.error(
                    f"{size} bytes at byte {int(offsets[outside][0])} of {buffer.name}, which has "
                    f"{buffer.bytes.size} bytes, in {int(outside.sum())} lanes"
                )
            self._check_alignment(at, size, ins)
            yield int(number), lanes

    def _check_alignment(self, addresses: np.ndarray, size: int, ins: Instruction) -> None:
        if size > 1 and np.bitwise_or.reduce(addresses) & (size - 1):
            address = int(addresses[(addresses & (size - 1)) != 0][0])
            buffer = self.buffers[(address >> _BUFFER_BITS) - 1]
            raise ins.error(f"misaligned access of {size} bytes at byte {address - buffer.base} of {buffer.name}")


class Shared:
    """Shared memory of several blocks. `rows` of every method says for each access which block's it is.

    races: None where all warps run as one.
    """

    def __init__(self, blocks: int, size: int, warps_apart: bool) -> None:
        self.size, self.stride = size, -(-size // 16) * 16
        self.races = Races(blocks, self.stride) if warps_apart else None
        memory = np.full(blocks * self.stride, POISON, np.uint8)
        self.words = {size: memory.view(word) for size, word in _WORDS.items()}

    def load(self, addresses: np.ndarray, rows: np.ndarray, size: int, ins: Instruction) -> np.ndarray:
        index = self._index(addresses, rows, size, ins)
        if self.races:
            self.races.read(index, size, ins)
        return self.words[size][index]

    def store(self, addresses: np.ndarray, rows: np.ndarray, values: np.ndarray, ins: Instruction) -> None:
        size = values.dtype.itemsize
        index = self._index(addresses, rows, size, ins)
        if self.races:
            self.races.write(index, size, _bits(self.words[size][index]) != _bits(values), ins)
        self.words[size][index] = values

    def read_by_product(self, addresses: np.ndarray, rows: np.ndarray, size: int, ins: Instruction) -> None:
        """Before a product of wgmma loads these."""
        if self.races:
            self.races.read_by_product(self._index(addresses, rows, size, ins), size, ins)

    def _index(self, addresses: np.ndarray, rows: np.ndarray, size: int, ins: Instruction) -> np.ndarray:
        offsets = addresses - SHARED_BASE
        if offsets.size and (offsets.min() < 0 or offsets.max() + size > self.size):
            outside = offsets[(offsets < 0) | (offsets + size > self.size)]
            raise ins.error(f"{size} bytes at byte {outside[0]} of shared memory, which has {self.size} bytes")
        if size > 1 and np.bitwise_or.reduce(offsets, axis=None) & (size - 1):
            wrong = offsets[(offsets & (size - 1)) != 0][0]
            raise ins.error(f"misaligned access of {size} bytes at byte {wrong} of shared memory")
        return (offsets + rows * self.stride) // size


def _bits(words: np.ndarray) -> np.ndarray:
    """To compare: words of 16 bytes as one number that is different where one of their halves is."""
    if words.dtype.itemsize < 16:
        return words
    halves = np.ascontiguousarray(words).view(_WORDS[8]).reshape(-1, 2)
    return halves[:, 0] * _WORDS[8].type(0x9E3779B97F4A7C15) ^ halves[:, 1]


def parameter_bytes(kind: str, value: int | float | bytes, name: str) -> bytes:
    """As the launch copies it. Raises: PtxError, for a value that the parameter's type does not hold."""
    if kind.startswith("b8["):
        if not isinstance(value, bytes) or len(value) != int(kind[3:-1]):
            raise PtxError(f"parameter {name}: expected {kind[3:-1]} bytes")
        return value
    dtype = DTYPES[kind]
    if dtype.kind == "f":
        return np.array(value, dtype).tobytes()
    bits = dtype.itemsize * 8
    if int(value) != value or not -(1 << bits - 1) <= value < 1 << bits:
        raise PtxError(f"parameter {name}: {value} is not a {kind}")
    return (int(value) % (1 << bits)).to_bytes(dtype.itemsize, "little")
