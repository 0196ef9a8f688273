"""Who touched shared memory since the last barrier: two warps without one between them race, whichever ran first.

A bit per warp and byte, for writes and for reads. A write races with what another warp read or wrote, a read with what
another warp wrote; but two may write the same value, as where both hold it. A copy under way writes when it is issued
and when it is waited for, and a product reads likewise. Warps that share a bit, eight apart, are not told apart.

Products of wgmma read through another proxy: before they may, what was written has to pass a fence, of the warp that
wrote it, or, behind a barrier, of the warp that reads.
"""

import numpy as np

from tests.ptx.parser import Instruction

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.uint64}


class Races:
    """Of the shared memory of several blocks, `stride` bytes apart. warp: the one that runs."""

    def __init__(self, blocks: int, stride: int) -> None:
        self.warp = 0
        self._read, self._written, self._unfenced = np.zeros((3, blocks, stride), np.uint8)

    def read(self, index: np.ndarray, size: int, ins: Instruction) -> None:
        """index: in words of `size` bytes."""
        me, others = self._bits(size)
        if (_words(self._written, size)[index] & others).any():
            raise ins.error("reads what another warp wrote, without a barrier between them")
        _words(self._read, size)[index] |= me

    def write(self, index: np.ndarray, size: int, changed: np.ndarray, ins: Instruction) -> None:
        """changed: where the word is not what it was."""
        me, others = self._bits(size)
        written, read = (_words(x, size) for x in (self._written, self._read))
        for touched, at, how in ((read, index, "read"), (written, index[changed], "wrote")):
            if (touched[at] & others).any():
                raise ins.error(f"overwrites what another warp {how}, without a barrier between them")
        written[index] |= me
        _words(self._unfenced, size)[index] = ~np.zeros((), _WORDS[size])

    def read_by_product(self, index: np.ndarray, size: int, ins: Instruction) -> None:
        me, _ = self._bits(size)
        if (_words(self._unfenced, size)[index] & me).any():
            raise ins.error("a product reads what was written without a fence between them")

    def fence(self, blocks: np.ndarray) -> None:
        """Of the warp that runs, in these blocks."""
        bit = np.uint8(1 << self.warp % 8)
        written, unfenced = self._written[blocks], self._unfenced[blocks]
        unfenced[(written & bit) != 0] = 0
        unfenced[written == 0] &= ~bit
        self._unfenced[blocks] = unfenced

    def barrier(self, blocks: np.ndarray) -> None:
        self._read[blocks] = self._written[blocks] = 0

    def _bits(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The bit of the warp that runs in each byte of a word, and those of all others."""
        me = np.full(8, 1 << self.warp % 8, np.uint8).view(_WORDS[size])[0]
        return me, ~me


def _words(x: np.ndarray, size: int) -> np.ndarray:
    words = x.reshape(-1).view(_WORDS[size])
    return words.reshape(-1, 2) if size == 16 else words
