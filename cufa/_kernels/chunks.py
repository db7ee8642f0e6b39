"""What kernels share that go through whole arrays, chunk by chunk, as memory lets them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .._call.problem import Static
from .kernel import SIZEOF, Kernel

ROW_THREADS = 256

LARGE_SMS = (80, 90, 100, 103)
"""Compute capabilities whose SMs hold 2048 threads; those of others hold 1536 at least."""

REGISTERS = 64
"""Of a thread, at most: what holds a chunk of some arrays and where it is. Half of the threads then fit an SM."""


@dataclass(frozen=True, kw_only=True)
class ConfigChunks:
    """The members of the C++ ``Config`` of such kernels.

    Attributes
    ----------
    element : str
    copy_bytes : int
        Of a chunk: what can be read and written at once of every row; the size of an element if no more.
    num_threads : int
    blocks_per_sm : int
        Thread blocks that an SM is to hold at a time, which leaves them so many registers.
    """

    element: str
    copy_bytes: int
    num_threads: int
    blocks_per_sm: int
    smem_bytes = 0

    @property
    def chunk(self) -> int:
        """Elements of a chunk."""
        return self.copy_bytes // SIZEOF[self.element]

    def types(self) -> dict[str, str]:
        return {"element": self.element}

    def includes(self) -> list[str]:
        return []

    def words(self) -> list[str]:
        return [self.element]


class ChunksGrid(NamedTuple):
    blocks: tuple[int, ...]


class ChunksKernel(Kernel):
    """A kernel of one launch, whose threads go through chunks."""

    def config(self, static: Static, arch: int) -> ConfigChunks:
        return ConfigChunks(**shared(static, arch))

    def blocks_per_sm(self, config: ConfigChunks) -> int:
        return config.blocks_per_sm


def threads_of(arch: int) -> int:
    """How many an SM holds."""
    return 2048 if arch in LARGE_SMS else 1536


def shared(static: Static, arch: int) -> dict[str, Any]:
    """The members of `ConfigChunks` for a problem."""
    return {
        "element": static.element,
        "copy_bytes": static.copy_bytes,
        "num_threads": ROW_THREADS,
        "blocks_per_sm": min((1 << 16) // REGISTERS, threads_of(arch)) // ROW_THREADS,
    }


def grid_of(config: ConfigChunks, extents: Sequence[int], num_sms: int) -> ChunksGrid:
    """As many blocks as run at a time, or as there are chunks for."""
    chunks = math.prod(extents)
    return ChunksGrid((min(-(-chunks // config.num_threads), config.blocks_per_sm * num_sms),))
