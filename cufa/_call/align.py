"""Which arrays are copied before they are read, because their rows are not aligned, and how the copies lie in memory.

What the fastest kernels read has rows of whole 16-byte chunks at aligned addresses. Of 16-bit arrays that have not, a
kernel makes copies that have; the main kernels then compute the same problem of the copies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .arrays import ALIGNMENT, Spec
from .problem import ITEMSIZE, Problem, has_tensor_map, widest_copy

LEAST_ROWS = 64
"""Rows of q that must share a key head for copies to pay, if they see all of its keys."""

TILE_ROWS = 128
"""Rows of q that read keys together, so that a tile of them reads as many more than a row of it sees."""

CHUNK = ALIGNMENT // 2
"""Elements that are copied at a time."""

WORKSPACE_ALIGNMENT = 64
"""Of the parts of memory that a call takes while it runs, in float32 numbers."""


class Axis(NamedTuple):
    """Chunks along one axis: how many, and how many elements apart in the array and in its copy."""

    extent: int
    source_step: int
    copy_step: int


class Copy(NamedTuple):
    """A copy to be made.

    Attributes
    ----------
    name : str
    source, copy : Spec
        Axes of stride 0 have it in the copy too.
    axes : tuple of Axis
        Along which its chunks are counted, the fastest first.
    chunk_axis : int
        Which of them goes along a row.
    offset : int
        Of the copy in the memory for all of them, in float32 numbers.
    """

    name: str
    source: Spec
    copy: Spec
    axes: tuple[Axis, ...]
    chunk_axis: int
    offset: int

    @property
    def copy_bytes(self) -> int:
        """Bytes that can be read at once from every row of the array."""
        return widest_copy(self.source, ITEMSIZE[self.source.dtype])


class Copies(NamedTuple):
    """All copies that a problem needs.

    Attributes
    ----------
    problem : Problem
        That of the copies, which is computed.
    made : tuple of Copy
    floats : int
        The memory that they take, in float32 numbers.
    """

    problem: Problem
    made: tuple[Copy, ...]
    floats: int


def copies_of(problem: Problem, arch: int) -> Copies | None:
    """The copies for a GPU of compute capability `arch`; None where they are not needed or do not pay."""
    static = problem.static
    assert static is not None
    if static.element == "f32":
        return None
    tiles = (name for name in problem.operation.tiles if name not in problem.operation.changed)
    names = [name for name in tiles if _is_slow(problem.specs[name], arch)]
    if not names or not pays(problem):
        return None
    made, floats = [], 0
    for name in names:
        made.append(_copy(name, problem.specs[name], floats))
        elements = CHUNK * math.prod(axis.extent for axis in made[-1].axes)
        floats += -(-elements // (2 * WORKSPACE_ALIGNMENT)) * WORKSPACE_ALIGNMENT
    copied = problem.of_other_memory({each.name: each.copy for each in made})
    assert copied.static is not None
    if not (copied.static.tma if arch // 10 == 9 else copied.static.copy_bytes > 2):
        return None
    return Copies(copied, tuple(made), floats)


def _is_slow(spec: Spec, arch: int) -> bool:
    """Whether how the array lies keeps the fastest kernel away, or lets the other one copy but single elements."""
    itemsize = ITEMSIZE[spec.dtype]
    return not has_tensor_map(spec, itemsize) if arch // 10 == 9 else widest_copy(spec, itemsize) == itemsize


def pays(problem: Problem) -> bool:
    """Whether tiles of queries would read every key about once at least, so that a copy of all costs less.

    Packed sequences count by their average. Of keys that may be dead (`seqused_k`) as many are taken to be read as
    there are queries.
    """
    sequences = max(1, problem.batch) if problem.varlen else 1
    seqlen_q, keys = problem.seqlen_q // sequences, problem.seqlen_k // sequences
    rows = seqlen_q * (problem.num_heads_q // max(1, problem.num_heads_k))
    seen = min(keys, seqlen_q) if "seqused_k" in problem.specs else keys
    if problem.window_left is not None and problem.window_right is not None:
        seen = min(seen, problem.window_left + problem.window_right + 1)
    return rows > 0 and rows * min(seen + TILE_ROWS, keys) >= LEAST_ROWS * max(1, keys)


def _copy(name: str, source: Spec, offset: int) -> Copy:
    """A copy whose axes lie in memory in the order of the array's, so that both are gone through side by side."""
    *extents, columns = source.shape
    *strides, column_stride = source.strides
    outer = [axis for axis, extent in enumerate(extents) if extent > 1 and strides[axis] != 0]
    outer.sort(key=lambda axis: (abs(strides[axis]), -axis))
    step = -(-columns // CHUNK) * CHUNK
    copy_strides = [0] * len(extents)
    axes = []
    for axis in outer:
        copy_strides[axis] = step
        axes.append(Axis(extents[axis], strides[axis], step))
        step *= extents[axis]
    # Where elements side by side in memory are of different rows, so are those that are read together.
    chunk_axis = int(bool(axes) and columns > 1 and abs(column_stride) > abs(axes[0].source_step))
    axes.insert(chunk_axis, Axis(-(-columns // CHUNK), CHUNK * column_stride, CHUNK))
    copy = source._replace(strides=(*copy_strides, 1), misalignment=0)
    return Copy(name, source, copy, tuple(axes), chunk_axis, offset)
