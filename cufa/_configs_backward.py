"""The tile tables of the backward: as `_configs`, one function for each main kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ._configs import (
    REGISTERS_SM90,
    SHARED_MEMORY,
    SIZEOF,
    STAGES,
    WARPGROUP_ROWS,
    Config,
    _common,
    _round_up,
    has_short_tile,
)
from ._problem import Static


@dataclass(frozen=True, kw_only=True)
class ConfigBackward(Config):
    """What every kernel of the backward has beside them.

    Attributes
    ----------
    copy_bytes, out_copy_bytes : int
        Widest copy that all rows allow that are not read through tensor maps, and those of out.
    deterministic : bool
        Whether blocks of keys add to dq in a fixed order.
    dq_threads : int
        Threads that hold a tile of dq.
    finishes : bool
        Whether thread blocks of the main kernel that find no more work write dq of heads that are done. Where packed
        sequences' tiles lie takes too long to find.
    sums_by_rows : bool
        Whether dq adds up in rows as those of q, and not in whole tiles, of which short sequences fill little.
    writes_dq : bool
        Whether the main kernel writes dq of sequences whose keys are all in one block, as dense ones then must be, and
        adds up nothing for them.
    row_tiles : int
        Tiles of rows that a thread block of the kernels before and after it takes.
    """

    copy_bytes: int
    out_copy_bytes: int
    deterministic: bool
    dq_threads: int
    finishes: bool = False
    sums_by_rows: bool = False
    writes_dq: bool = False
    row_tiles: int = 1


@dataclass(frozen=True, kw_only=True)
class ConfigBackwardSm80(ConfigBackward):
    """What ``cuda_src/attention/backward_sm80.cuh`` has beside them.

    Attributes
    ----------
    score_row_warps, score_column_warps : int
        Warps that split the keys, and the queries, of a tile of scores.
    key_row_warps : int
        Warps that split the keys of dk and dv; the others split their columns.
    dq_row_warps : int
        Warps that split the queries of a tile of dq; the others split its columns.
    stages : int
        Tiles of q and dout in shared memory.
    copy_unroll : int
        Passes over a tile's rows that are copied at a time.
    """

    score_row_warps: int
    score_column_warps: int
    key_row_warps: int
    dq_row_warps: int
    stages: int
    copy_unroll: int


class TileSm80(NamedTuple):
    """What a row of the table says."""

    block_m: int
    block_n: int
    warps: int
    score_row_warps: int
    score_column_warps: int
    key_row_warps: int
    dq_row_warps: int
    stages: int


def backward_sm80(static: Static, arch: int, deterministic: bool, average_rows: int) -> ConfigBackwardSm80:
    """Config of the mma.sync backward for compute capability `arch` (80 for 8.0); rows: of an average sequence."""
    short = has_short_tile(static)
    tile = _short_tile_sm80(static) if short else _tile_sm80(static, arch)
    size = SIZEOF[static.element]
    # Every warp has whole steps of 16 columns.
    key_columns, dq_columns = 16 * tile.warps // tile.key_row_warps, 16 * tile.warps // tile.dq_row_warps
    if dq_columns == 32 and static.head_dim > 128:
        dq_columns = 64  # in two passes
    tile_head_dim = _round_up(static.head_dim, max(32, key_columns, dq_columns))
    tile_head_dim_v = _round_up(static.head_dim_v, max(32, key_columns))
    keys = tile.block_n * (tile_head_dim + tile_head_dim_v + 2 * tile.block_m)
    queries = tile.block_m * (size * (tile_head_dim + tile_head_dim_v) + 8)
    return ConfigBackwardSm80(
        **_common(static),
        tile_head_dim=tile_head_dim,
        tile_head_dim_v=tile_head_dim_v,
        block_m=tile.block_m,
        block_n=tile.block_n,
        num_threads=32 * tile.warps,
        score_row_warps=tile.score_row_warps,
        score_column_warps=tile.score_column_warps,
        key_row_warps=tile.key_row_warps,
        dq_row_warps=tile.dq_row_warps,
        dq_threads=32 * tile.warps,
        stages=tile.stages,
        smem_bytes=size * keys + tile.stages * queries,
        copy_bytes=static.copy_bytes,
        out_copy_bytes=static.out_copy_bytes,
        copy_unroll=1 if static.copy_bytes < 16 or static.element == "f32" else 2,
        deterministic=deterministic,
        sums_by_rows=static.varlen and (short or average_rows < tile.block_m),
        writes_dq=short,
        row_tiles=8 // tile.warps if short else 1,
    )


def _short_tile_sm80(static: Static) -> TileSm80:
    """One block of keys holds those of a short sequence, a warp 16 of them; some share them where columns are many."""
    row_warps, widest = static.short_keys // 16, max(static.head_dim, static.head_dim_v)
    column_warps = 1
    if widest > (64 if static.element == "f32" else 128):
        column_warps = 4 if widest > 192 and row_warps == 1 else 2
    block_m = static.short_rows if column_warps == 1 and row_warps <= 2 else 16
    return TileSm80(block_m, static.short_keys, row_warps * column_warps, row_warps, 1, row_warps, 1, 1)


def _tile_sm80(static: Static, arch: int) -> TileSm80:
    widest = max(static.head_dim, static.head_dim_v)
    memory = SHARED_MEMORY[arch] >> 10
    if static.element == "f32":
        if widest <= 64:
            return TileSm80(64, 64, 8, 4, 2, 4, 4, 2 if memory > 99 else 1)
        if widest <= 128:
            return TileSm80(32, 64, 8, 4, 2, 4, 2, 2) if memory > 99 else TileSm80(32, 32, 8, 2, 2, 2, 2, 1)
        if widest <= 192:
            return TileSm80(32, 32, 8, 2, 2, 2, 2, 2) if memory > 99 else TileSm80(16, 32, 4, 2, 1, 2, 1, 1)
        return TileSm80(32, 32, 8, 2, 2, 2, 2, 1) if memory > 99 else TileSm80(16, 16, 8, 1, 1, 1, 1, 1)
    if widest <= 64:
        return TileSm80(128, 128, 8, 2, 4, 4, 4, 2) if memory > 99 else TileSm80(64, 128, 8, 4, 2, 4, 4, 2)
    if widest <= 96:
        return TileSm80(64, 128, 8, 4, 2, 4, 4, 2) if memory > 99 else TileSm80(64, 64, 8, 2, 4, 4, 4, 2)
    if widest <= 128:
        return TileSm80(64, 128, 8, 4, 2, 4, 2, 2) if memory > 99 else TileSm80(64, 64, 8, 2, 4, 2, 2, 1)
    if widest <= 192:
        return TileSm80(64, 64, 8, 2, 4, 2, 2, 2) if memory > 99 else TileSm80(32, 64, 8, 4, 2, 2, 2, 1)
    return TileSm80(64, 64, 8, 1, 4, 2, 2, 1) if memory > 99 else TileSm80(32, 32, 8, 2, 2, 1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class ConfigBackwardSm90(ConfigBackward):
    """What ``cuda_src/attention/backward_sm90.cuh`` and ``backward_split_sm90.cuh`` have beside them.

    Of the threads a warpgroup loads and adds up dq; the others compute.

    Attributes
    ----------
    producer_registers, consumer_registers : int
        Registers a thread of the warpgroup that loads, and of the others.
    """

    producer_registers: int
    consumer_registers: int


def backward_sm90(static: Static, deterministic: bool, average_rows: int) -> ConfigBackwardSm90:
    """Config of the wgmma backward."""
    block_m, block_n = _tile_backward_sm90(static, average_rows)
    size = SIZEOF[static.element]
    tile_head_dim, tile_head_dim_v = _round_up(static.head_dim, 64), _round_up(static.head_dim_v, 64)
    tiles = size * ((block_n + STAGES * block_m) * (tile_head_dim + tile_head_dim_v) + STAGES * block_m * block_n)
    sums_stages = 1 if block_m == 128 else 2
    rows = 4 * block_m * (sums_stages * tile_head_dim + 2 * STAGES)  # sums of dq, row_lse and row_delta
    producer_registers, consumer_registers = (40, 232) if deterministic else REGISTERS_SM90[block_n // WARPGROUP_ROWS]
    return ConfigBackwardSm90(
        **_common(static),
        tile_head_dim=tile_head_dim,
        tile_head_dim_v=tile_head_dim_v,
        block_m=block_m,
        block_n=block_n,
        num_threads=128 * (1 + block_n // WARPGROUP_ROWS),
        smem_bytes=_round_up(tiles + rows + _barriers_bytes(*[STAGES] * 4, 1, 1, 1, sums_stages, sums_stages), 16),
        copy_bytes=static.copy_bytes,
        out_copy_bytes=static.out_copy_bytes,
        deterministic=deterministic,
        dq_threads=2 * block_n,
        finishes=not static.varlen,
        producer_registers=producer_registers,
        consumer_registers=consumer_registers,
    )


def backward_split_sm90(static: Static) -> ConfigBackwardSm90:
    """Config of the wgmma backward in two passes."""
    block = WARPGROUP_ROWS
    size = SIZEOF[static.element]
    tile_head_dim, tile_head_dim_v = _round_up(static.head_dim, 64), _round_up(static.head_dim_v, 64)
    both = tile_head_dim + tile_head_dim_v
    weights, rows = size * STAGES * block * block, 2 * 4 * STAGES * block
    keys = size * (1 + STAGES) * block * both + weights + rows + _barriers_bytes(*[STAGES] * 3, 1, 1)
    queries = size * block * (2 * both + STAGES * tile_head_dim + tile_head_dim_v) + _barriers_bytes(STAGES, 1) + 8
    producer_registers, consumer_registers = REGISTERS_SM90[2]
    return ConfigBackwardSm90(
        **_common(static),
        tile_head_dim=tile_head_dim,
        tile_head_dim_v=tile_head_dim_v,
        block_m=block,
        block_n=block,
        num_threads=3 * 128,
        smem_bytes=max(keys, queries),
        copy_bytes=static.copy_bytes,
        out_copy_bytes=static.out_copy_bytes,
        deterministic=False,  # in no order: nothing is added up in memory
        dq_threads=2 * 128,
        producer_registers=producer_registers,
        consumer_registers=consumer_registers,
    )


def _barriers_bytes(*rings: int) -> int:
    """Of rings of so many stages: ``Ring::bytes`` in tile/pipeline.cuh."""
    return 2 * 8 * sum(rings)


def _tile_backward_sm90(static: Static, average_rows: int) -> tuple[int, int]:
    """(block_m, block_n)."""
    widest = max(static.head_dim, static.head_dim_v)
    return 128 if widest <= 64 and not static.softcap and average_rows > 64 else 64, 128
