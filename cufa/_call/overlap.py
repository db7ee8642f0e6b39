"""Whether views share memory, decided exactly: a result is written while other arrays are still read.

That two strided sets meet is a bounded equation in integers. NumPy's solver answers it for any addresses without
looking at the memory behind them, so that arrays on a GPU can be asked about too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

EFFORT = 100_000
"""Candidates that the solver may try: some milliseconds. Layouts of real arrays take a few."""

_BASE = 1 << 60


class Extent(NamedTuple):
    """Where an array's elements lie; strides in bytes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    def span(self) -> tuple[int, int]:
        """The bytes from the array's address at which its elements begin and end; the same twice if there are none."""
        if 0 in self.shape:
            return 0, 0
        steps = [stride * (extent - 1) for stride, extent in zip(self.strides, self.shape, strict=True)]
        return sum(step for step in steps if step < 0), self.itemsize + sum(step for step in steps if step > 0)


class _Addresses:
    """What NumPy takes for an array; nothing reads or writes there."""

    def __init__(self, extent: Extent, address: int) -> None:
        self.__array_interface__ = {
            "data": (_BASE + address, False),
            "shape": extent.shape,
            "strides": extent.strides,
            "typestr": f"|V{extent.itemsize}",
            "version": 3,
        }


def overlap(a: Extent, b: Extent, distance: int) -> bool | None:
    """Whether `a` shares memory with `b`, which begins `distance` bytes before it; None if that is too hard to say."""
    if 0 in a.shape or 0 in b.shape:
        return False
    first, second = (np.asarray(_Addresses(*each)) for each in ((a, distance), (b, 0)))
    try:
        return bool(np.shares_memory(first, second, max_work=EFFORT))  # type: ignore[arg-type]  # as documented
    except np.exceptions.TooHardError:
        return None


def overlaps_itself(extent: Extent) -> bool | None:
    """Whether two elements share memory; None if that is too hard to say."""
    if 0 in extent.shape:
        return False
    axes = sorted(
        ((abs(stride), count) for stride, count in zip(extent.strides, extent.shape, strict=True) if count > 1),
        reverse=True,
    )
    if _nested(axes, extent.itemsize):
        return False
    answers = []
    for index, (stride, count) in enumerate(axes):
        # Of two elements that differ along this axis, and not along those before: do all their others meet?
        strides = tuple(each for each, _ in axes[index + 1 :])
        counts = tuple(each for _, each in axes[index + 1 :])
        later = Extent((count - 1, *counts), (stride, *strides), extent.itemsize)
        answers.append(overlap(later, Extent(counts, strides, extent.itemsize), stride))
    return True if True in answers else None if None in answers else False


def _nested(axes: list[tuple[int, int]], itemsize: int) -> bool:
    """Whether every step is past all that the smaller ones reach, as in slices of an array."""
    reach = itemsize
    for stride, count in reversed(axes):
        if stride < reach:
            return False
        reach += stride * (count - 1)
    return True


def extent_of(spec: Any, itemsize: int) -> Extent:
    """The extent of a `Spec`."""
    return Extent(spec.shape, tuple(stride * itemsize for stride in spec.strides), itemsize)
