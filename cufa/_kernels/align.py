"""The kernel that copies arrays whose rows are not aligned, before others read them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from .._call.align import Copies
from .._call.problem import Static
from .._driver.launch import Argument
from .chunks import ROW_THREADS, threads_of
from .kernel import Kernel, Plan
from .record import Record

COPIED_ARRAYS, COPIED_AXES = 4, 4
"""Arrays that a launch may copy, and axes of each: ``attention::AlignParams``."""


@dataclass(frozen=True, kw_only=True)
class ConfigAlign:
    """The members of the C++ ``Config`` of ``cuda_src/attention/align.cuh``, which serves all arrays.

    Attributes
    ----------
    num_threads : int
    blocks_per_sm : int
        Thread blocks that an SM is to hold at a time, which leaves them so many registers.
    """

    num_threads: int
    blocks_per_sm: int
    smem_bytes = 0

    def types(self) -> dict[str, str]:
        return {}

    def includes(self) -> list[str]:
        return []

    def words(self) -> list[str]:
        return []


class AlignGrid(NamedTuple):
    blocks: tuple[int, ...]


class Align(Kernel):
    """Copies that are made before the main kernels' launches."""

    name = "attention_align"
    record = "AlignParams"

    def config(self, static: Static | None, arch: int) -> ConfigAlign:
        return ConfigAlign(num_threads=ROW_THREADS, blocks_per_sm=threads_of(arch) // ROW_THREADS)

    def blocks_per_sm(self, config: ConfigAlign) -> int:
        return config.blocks_per_sm

    def asserts(self) -> str:
        return (
            f"static_assert(attention::AlignParams::arrays == {COPIED_ARRAYS});\n"
            f"static_assert(attention::AlignParams::axes == {COPIED_AXES});\n"
        )


ALIGN = Align()


def plan_for(arch: int) -> Plan:
    """The kernel for a GPU of compute capability `arch`."""
    return Plan(ALIGN, arch, ALIGN.config(None, arch))


def grid_of(config: ConfigAlign, copies: Copies, num_sms: int) -> AlignGrid:
    """As many blocks as run at a time, or as there are chunks for."""
    chunks = max(math.prod(axis.extent for axis in each.axes) for each in copies.made)
    return AlignGrid((min(-(-chunks // config.num_threads), config.blocks_per_sm * num_sms),))


def argument_of(record: Record, copies: Copies) -> Argument:
    """What the launch for some copies is given."""
    return Argument(record.pack(values_of(copies)), tuple((each.offset, each.name) for each in record.pointers()))


def values_of(copies: Copies) -> dict[str, Any]:
    """The members of ``attention::AlignParams`` but the addresses."""
    made, missing = copies.made, COPIED_ARRAYS - len(copies.made)
    axes = [[*each.axes, *[(1, 0, 0)] * (COPIED_AXES - len(each.axes))] for each in made]
    axes += [[(0, 0, 0)] * COPIED_AXES] * missing  # no chunks
    extents, source_steps, copy_steps = zip(*(axis for each in axes for axis in each), strict=True)
    rest = [0] * missing
    return {
        "source_steps": source_steps,
        "copy_steps": copy_steps,
        "column_strides": [*(each.source.strides[-1] for each in made), *rest],
        "extents": extents,
        "columns": [*(each.source.shape[-1] for each in made), *rest],
        "chunk_axes": [*(each.chunk_axis for each in made), *rest],
        "copy_bytes": [*(each.copy_bytes for each in made), *rest],
    }
