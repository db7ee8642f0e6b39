"""The tile tables of the backward: as `_configs`, one function for each main kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ._configs import SHARED_MEMORY, SIZEOF, Config, _common, _round_up
from ._problem import Static


@dataclass(frozen=True, kw_only=True)
class ConfigBackwardSm80(Config):
    """What ``cuda_src/attention/backward_sm80.cuh`` has beside them.

    Attributes
    ----------
    score_row_warps, score_column_warps : int
        Warps that split the keys, and the queries, of a tile of scores.
    key_row_warps : int
        Warps that split the keys of dk and dv; the others split their columns.
    dq_row_warps : int
        Warps that split the queries of a tile of dq; the others split its columns.
    dq_threads : int
        Threads that hold a part of a tile of dq: all.
    stages : int
        Tiles of q and dout in shared memory.
    copy_bytes : int
    copy_unroll : int
        Passes over a tile's rows that are copied at a time.
    deterministic : bool
        Whether blocks of keys add to dq in a fixed order.
    """

    score_row_warps: int
    score_column_warps: int
    key_row_warps: int
    dq_row_warps: int
    dq_threads: int
    stages: int
    copy_bytes: int
    copy_unroll: int
    deterministic: bool
    split: bool = False
    finishes: bool = False


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


def backward_sm80(static: Static, arch: int, deterministic: bool) -> ConfigBackwardSm80:
    """Config of the mma.sync backward for compute capability `arch` (80 for 8.0)."""
    tile = _tile_sm80(static, arch)
    size = SIZEOF[static.element]
    # Every warp has whole steps of 16 columns.
    key_columns, dq_columns = 16 * tile.warps // tile.key_row_warps, 16 * tile.warps // tile.dq_row_warps
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
        copy_unroll=1 if static.copy_bytes < 16 or static.element == "f32" else 2,
        deterministic=deterministic,
    )


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
        return TileSm80(128 if memory > 99 else 64, 128, 8, 4, 2, 4, 4, 2)
    if widest <= 96:
        return TileSm80(64, 128, 8, 4, 2, 4, 4, 2) if memory > 99 else TileSm80(64, 64, 8, 2, 4, 4, 4, 2)
    if widest <= 128:
        return TileSm80(64, 128, 8, 4, 2, 4, 2, 2) if memory > 99 else TileSm80(64, 64, 8, 2, 4, 2, 2, 1)
    if widest <= 192:
        return TileSm80(64, 64, 8, 2, 4, 2, 2, 2) if memory > 99 else TileSm80(32, 64, 8, 4, 2, 2, 2, 1)
    return TileSm80(64, 64, 8, 2, 4, 2, 2, 1) if memory > 99 else TileSm80(32, 32, 8, 2, 2, 1, 1, 1)
