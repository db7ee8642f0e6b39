"""Device memory: a file that programs of kernels map where its addresses say, and what they may do there."""

from __future__ import annotations

import mmap
import os
from typing import Any, NamedTuple

import numpy as np

BASE = 1 << 40
"""The address of the first byte. It is a multiple of every alignment."""

CAPACITY = 1 << 29
"""Bytes; those that nobody has touched take no memory."""

GAP = 512
"""Bytes between allocations, whose addresses are multiples of it too. None of them may be touched."""

READABLE, WRITABLE = 1, 2
POISONS = (0x7FFF7FFF, 0x461C461C)
"""What memory may hold at first: NaN in every dtype, or numbers, which hide in sums; and no small integers."""


class Block(NamedTuple):
    """What was allocated together: its name, offset and size in bytes."""

    name: str
    offset: int
    size: int


class Memory:
    """Device memory, of which nothing is freed before all of it.

    Parameters
    ----------
    poison : int
        One of `POISONS`.

    Attributes
    ----------
    file : int
        Its descriptor. Behind the memory itself it has as many bytes that say what kernels may do with each.
    """

    def __init__(self, poison: int) -> None:
        self.poison = poison
        self.file = os.memfd_create("cufa-emulated")
        os.ftruncate(self.file, 2 * CAPACITY)
        self._map = mmap.mmap(self.file, 2 * CAPACITY)
        whole = np.frombuffer(self._map, np.uint8)
        self._bytes, self._rights = whole[:CAPACITY], whole[CAPACITY:]
        self._blocks: list[Block] = []
        self._end = GAP

    def close(self) -> None:
        os.close(self.file)

    def allocate(self, name: str, size: int, offset: int = 0) -> int:
        """The address of `size` bytes, `offset` behind a multiple of `GAP`, with which kernels may do nothing yet."""
        begin = self._end + offset % GAP
        self._end = -(-(begin + size) // GAP) * GAP + GAP
        if self._end > CAPACITY:
            raise MemoryError(f"{size} bytes for {name} are more than an emulated GPU has.")
        first, last = begin // 4 * 4, begin + size // 4 * 4 + 4
        self._bytes[first:last].view(np.uint32)[...] = self.poison
        self._blocks.append(Block(name, begin, size))
        return BASE + begin

    def view(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any) -> Any:
        """The array of these elements, which shares the memory; strides are in elements."""
        return _strided(self._bytes, address, shape, strides, np.dtype(dtype))

    def allow(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, rights: int) -> None:
        """Let kernels do so with the elements of an array, beside what they may already."""
        elements = _strided(self._rights, address, shape, strides, np.dtype(f"V{itemsize}"))
        if elements.size:
            single = np.lib.stride_tricks.as_strided(
                _strided(self._rights, address, (1,), (1,), np.dtype(np.uint8)),
                (*shape, itemsize),
                (*elements.strides, 1),
            )
            single[...] |= rights

    def named(self, address: int) -> str:
        """Where an address lies, in words."""
        offset = address - BASE
        for block in self._blocks:
            if block.offset <= offset < block.offset + block.size:
                return f"byte {offset - block.offset} of the {block.size} of {block.name}"
        for block in self._blocks:
            if offset < block.offset and block.offset - offset <= GAP:
                return f"{block.offset - offset} bytes before {block.name}"
            if 0 <= offset - block.offset - block.size < GAP:
                return f"{offset - block.offset - block.size} bytes behind the end of {block.name}"
        return "in no allocation"


def _strided(flat: Any, address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    if 0 in shape:
        return np.empty(shape, dtype)
    offset = address - BASE
    # A view of bytes needs no alignment, and negative strides may go back from the first element.
    return np.ndarray(
        shape, dtype, buffer=flat.data, offset=offset, strides=tuple(stride * dtype.itemsize for stride in strides)
    )
