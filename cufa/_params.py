"""The Params record: Python's half of ``attention::Params``, and the assertions that hold the two together."""

from __future__ import annotations

import itertools
import math
import struct
from typing import NamedTuple

from ._align import Copies
from ._arrays import contiguous
from ._plan import MAX_LISTED_BLOCKS, BackwardGrid, Grid
from ._problem import BASE_SHIFT, CHAIN_ROWS, MAX_SEQLEN, Problem


class Field(NamedTuple):
    """A member of the C++ struct: its name, `struct` format and how many values it holds."""

    name: str
    format: str
    length: int = 1


FIELDS = (
    *(Field(name, "Q") for name in ("q", "k", "v", "out", "lse", "alibi_slopes", "sinks")),
    *(Field(name, "Q") for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")),
    *(Field(f"{name}_strides", "q", 4) for name in ("q", "k", "v", "out")),
    *(Field(name, "q") for name in ("lse_batch_stride", "lse_head_stride")),
    *(Field(name, "q") for name in ("alibi_batch_stride", "alibi_head_stride", "sinks_stride")),
    *(Field(f"{name}_stride", "q") for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")),
    *(Field(name, "i") for name in ("batch", "seqlen_q", "seqlen_k", "num_heads_q", "qheads_per_khead")),
    *(Field(name, "i") for name in ("m_blocks", "heads_per_section", "window_left", "window_right")),
    *(Field(name, "f") for name in ("softmax_scale", "softcap", "softcap_inverse", "softcap_exponent")),
    *(Field(name, "i") for name in ("m_units", "units_per_block", "clear_out")),
    Field("exponent_scale", "f"),
)
POINTERS = 10
"""Leading members that are addresses, in the order that `launch` receives them."""

MAP_BYTES = 128

LAYOUT = struct.Struct("@" + "".join(f"{field.length}{field.format}" for field in FIELDS) + "0q")
POINTER_LAYOUT = struct.Struct(f"@{POINTERS}Q")


DEAL_LAYOUT = struct.Struct(f"@i{MAX_LISTED_BLOCKS + 1}H{4 * MAX_LISTED_BLOCKS}H")
"""``attention::Deal``."""

MAPS_BYTES = 3 * MAP_BYTES
TMA_SIZE = -(-(MAPS_BYTES + LAYOUT.size + DEAL_LAYOUT.size) // 64) * 64
"""Size of ``attention::TmaParams``: the tensor maps of q, k and v, Params and Deal, in alignments of 64 bytes."""


BACKWARD_FIELDS = (
    *(Field(name, "Q") for name in ("dout", "dlse", "dq", "dk", "dv", "dsinks")),
    *(Field(name, "Q") for name in ("row_lse", "row_delta", "dq_sum", "turns", "next_unit", "heads_done")),
    *(Field(name, "Q") for name in ("offsets_q", "offsets_k", "not_finite", "chains")),
    *(Field(f"{name}_strides", "q", 4) for name in ("dout", "dq", "dk", "dv", "lse", "dlse")),
    Field("workspace_rows", "q"),
    Field("n_blocks", "i"),
    Field("reversed", "i"),
)
"""The members of ``attention::BackwardParams`` that follow Params there."""
BACKWARD_POINTERS = 16

BACKWARD_LAYOUT = struct.Struct("@" + "".join(f"{field.length}{field.format}" for field in BACKWARD_FIELDS))
BACKWARD_MAPS_BYTES = 4 * MAP_BYTES
BACKWARD_SIZE = -(-(BACKWARD_MAPS_BYTES + LAYOUT.size + BACKWARD_LAYOUT.size) // 64) * 64
"""Size of ``attention::BackwardArgument``: the tensor maps of q, k, v and dout, and BackwardParams."""


COPIED_ARRAYS = 4
"""Arrays that a launch may copy: ``attention::AlignParams::arrays``."""
COPIED_AXES = 4

ALIGN_FIELDS = (
    *(Field(name, "Q", COPIED_ARRAYS) for name in ("sources", "copies")),
    *(Field(name, "q", COPIED_ARRAYS * COPIED_AXES) for name in ("source_steps", "copy_steps")),
    Field("column_strides", "q", COPIED_ARRAYS),
    Field("extents", "i", COPIED_ARRAYS * COPIED_AXES),
    *(Field(name, "i", COPIED_ARRAYS) for name in ("columns", "chunk_axes", "copy_bytes")),
)
"""The members of ``attention::AlignParams``."""

ALIGN_LAYOUT = struct.Struct("@" + "".join(f"{field.length}{field.format}" for field in ALIGN_FIELDS))
ALIGN_POINTER_LAYOUT = struct.Struct(f"@{2 * COPIED_ARRAYS}Q")


def static_asserts() -> str:
    """C++ that fails to compile where the struct, or what decides which kernel runs, is another there than here."""
    return (
        f"static_assert(sizeof(attention::Params) == {LAYOUT.size});\n"
        f"static_assert(tile::chain_rows == {CHAIN_ROWS});\n"
    ) + _offset_asserts("Params", FIELDS, 0)


def _offset_asserts(record: str, fields: tuple[Field, ...], offset: int) -> str:
    lines = []
    for field in fields:
        # What offsetof expands to in NVRTC's front end; NVRTC before 13.3 has no __builtin_offsetof.
        address = f"&static_cast<attention::{record}*>(nullptr)->{field.name}"
        lines.append(f"static_assert(__INTADDR__({address}) == {offset});")
        offset += field.length * struct.calcsize(field.format)
    return "\n".join(lines) + "\n"


def backward_static_asserts() -> str:
    """The same for the argument of the backward's kernels."""
    params = "static_cast<attention::BackwardArgument*>(nullptr)->params"
    return (
        static_asserts()
        + _offset_asserts("BackwardParams", BACKWARD_FIELDS, LAYOUT.size)
        + f"static_assert(sizeof(attention::BackwardArgument) == {BACKWARD_SIZE});\n"
        + f"static_assert(__INTADDR__(&{params}) == {BACKWARD_MAPS_BYTES});\n"
    )


def tma_static_asserts() -> str:
    """The same for the struct that leads with tensor maps."""
    params = "static_cast<attention::TmaParams*>(nullptr)"
    return static_asserts() + (
        f"static_assert(attention::Softmax<bf16, 1>::shift == {BASE_SHIFT});\n"
        f"static_assert(sizeof(attention::TmaParams) == {TMA_SIZE});\n"
        f"static_assert(__INTADDR__(&{params}->params) == {MAPS_BYTES});\n"
        f"static_assert(__INTADDR__(&{params}->deal) == {MAPS_BYTES + LAYOUT.size});\n"
        f"static_assert(attention::Deal::max_blocks == {MAX_LISTED_BLOCKS});\n"
    )


def align_static_asserts() -> str:
    """The same for the argument of the kernel that copies."""
    asserts = f"static_assert(sizeof(attention::AlignParams) == {ALIGN_LAYOUT.size});\n"
    return asserts + _offset_asserts("AlignParams", ALIGN_FIELDS, 0)


def pack_align(copies: Copies) -> bytes:
    """AlignParams with null addresses."""
    made, missing = copies.made, COPIED_ARRAYS - len(copies.made)
    axes = [[*each.axes, *[(1, 0, 0)] * (COPIED_AXES - len(each.axes))] for each in made]
    axes += [[(0, 0, 0)] * COPIED_AXES] * missing  # no chunks
    extents, source_steps, copy_steps = zip(*itertools.chain.from_iterable(axes), strict=True)
    others = [
        [(each.source.strides[-1], each.source.shape[-1], each.chunk_axis, each.copy_bytes) for each in made],
        [(0, 0, 0, 0)] * missing,
    ]
    column_strides, columns, chunk_axes, copy_bytes = zip(*itertools.chain.from_iterable(others), strict=True)
    values = (*source_steps, *copy_steps, *column_strides, *extents, *columns, *chunk_axes, *copy_bytes)
    return ALIGN_LAYOUT.pack(*[0] * (2 * COPIED_ARRAYS), *values)


def pack(problem: Problem, grid: Grid) -> bytes:
    """Params of `problem` with null addresses: what every launch of it shares."""
    return _pack(problem, grid.m_blocks, grid.heads_per_section, grid.m_units, grid.units_per_block)


def _pack(problem: Problem, m_blocks: int, heads_per_section: int, m_units: int, units_per_block: int = 1) -> bytes:
    strides = problem.strides
    out = strides.get("out") or contiguous(problem.out_shape)
    lse = contiguous(problem.lse_shape)
    alibi = strides.get("alibi_slopes", (0,))
    values: list[float] = [0] * POINTERS
    for each in (strides["q"], strides["k"], strides["v"], out):
        values += _four(each)
    values += lse[:2] if len(lse) == 3 else (0, lse[0])
    values += alibi if len(alibi) == 2 else (0, *alibi)
    values += (strides.get(name, (0,))[0] for name in ("sinks", "cu_seqlens_q", "cu_seqlens_k", "seqused_k"))
    values += (problem.batch, problem.seqlen_q, problem.seqlen_k, problem.num_heads_q)
    values += (problem.num_heads_q // max(1, problem.num_heads_k), m_blocks, heads_per_section)
    values += (MAX_SEQLEN if side is None else side for side in (problem.window_left, problem.window_right))
    inverse = 1.0 / problem.softcap if problem.softcap else 0.0
    values += (problem.softmax_scale, problem.softcap, inverse, 2.0 * inverse / math.log(2.0))
    values += (m_units, units_per_block, "out" not in strides, problem.softmax_scale / math.log(2.0))
    return LAYOUT.pack(*values)


def _four(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of batch, rows, heads and columns; packed arrays have no batch."""
    return strides if len(strides) == 4 else (0, *strides)


def pack_backward(problem: Problem, grid: BackwardGrid) -> bytes:
    """BackwardParams of `problem` with null addresses."""
    strides, values = problem.strides, [0] * BACKWARD_POINTERS
    values += _four(strides["dout"])
    for name in ("q", "k", "v"):
        values += _four(strides.get(f"d{name}") or contiguous(problem.shape(name)))
    for name in ("lse", "dlse"):  # of batch, heads and rows
        *batch, head, row = strides.get(name, (0, 0, 0))
        values += (batch[0] if batch else 0, row, head, 0)
    values += (grid.workspace_rows, grid.n_blocks, grid.reversed)
    params = _pack(problem, grid.m_blocks, grid.heads_per_section, grid.m_blocks)
    return params + BACKWARD_LAYOUT.pack(*values)


def pack_deal(grid: Grid) -> bytes:
    """Deal of a launch."""
    tiles = [tile for listed in grid.listed for tile in listed]
    begin = [0, *itertools.accumulate(map(len, grid.listed))]
    begin += [len(tiles)] * (MAX_LISTED_BLOCKS + 1 - len(begin))
    tiles += [0] * (4 * MAX_LISTED_BLOCKS - len(tiles))
    return DEAL_LAYOUT.pack(grid.round_units, *begin, *tiles)
