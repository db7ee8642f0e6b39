"""The gradients for sm_80 and newer: mma.sync, and cp.async of whatever width the arrays allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .._call.problem import Problem, Static
from .backward import BackwardGrid, BackwardKernel, ConfigBackward, Counts
from .backward_sm90 import WIDEST
from .kernel import (
    SHARED_MEMORY,
    SIZEOF,
    Map,
    common,
    has_short_tile,
    known_arch,
    listed_blocks,
    reason_for_every_gpu,
    round_up,
)
from .record import MAP_BYTES


@dataclass(frozen=True, kw_only=True)
class ConfigBackwardSm80(ConfigBackward):
    """What ``cuda_src/attention/backward_sm80.cuh`` needs besides.

    Attributes
    ----------
    score_row_warps, score_column_warps : int
        Warps that split the keys, and the queries, of a tile of scores.
    key_row_warps : int
        Warps that split the keys of dk and dv; the others split their columns.
    halves : bool
        Whether half of the warps have dv and the others dk; else each has a part of both.
    score_halves : bool
        Whether half of the warps make P, and the others dS.
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
    halves: bool
    score_halves: bool
    dq_row_warps: int
    stages: int
    copy_unroll: int


class BackwardSm80(BackwardKernel):
    """The gradients for every GPU."""

    name = "attention_backward_sm80"
    main_entries = ("attention_backward_sm80",)

    def reason(self, static: Static, arch: int) -> str:
        return reason_for_every_gpu(static, arch)

    def config(self, static: Static, arch: int) -> ConfigBackwardSm80:
        short = has_short_tile(static)
        row = short_tile(static) if short else tile(static, known_arch(arch))
        size = SIZEOF[static.element]
        # Every warp has whole steps of 16 columns.
        key_columns = 16 * (row.warps // 2 if row.halves else row.warps) // row.key_row_warps
        dq_columns = 16 * row.warps // row.dq_row_warps
        if dq_columns == 32 and static.head_dim > 128:
            dq_columns = 64  # in two passes
        tile_head_dim = round_up(static.head_dim, max(32, key_columns, dq_columns))
        tile_head_dim_v = round_up(static.head_dim_v, max(32, key_columns))
        keys = row.block_n * (tile_head_dim + tile_head_dim_v + 2 * row.block_m)
        queries = row.block_m * (size * (tile_head_dim + tile_head_dim_v) + 8)
        exact = 4 * row.block_m * row.block_n if row.score_halves else 0
        return ConfigBackwardSm80(
            **common(static),
            tile_head_dim=tile_head_dim,
            tile_head_dim_v=tile_head_dim_v,
            block_m=row.block_m,
            block_n=row.block_n,
            num_threads=32 * row.warps,
            score_row_warps=row.score_row_warps,
            score_column_warps=row.score_column_warps,
            key_row_warps=row.key_row_warps,
            halves=row.halves,
            score_halves=row.score_halves,
            dq_row_warps=row.dq_row_warps,
            dq_threads=32 * row.warps,
            stages=row.stages,
            smem_bytes=size * keys + row.stages * queries + exact,
            copy_bytes=static.copy_bytes,
            out_copy_bytes=static.out_copy_bytes,
            copy_unroll=1 if static.copy_bytes < 16 or static.element == "f32" else 4,
            deterministic=static.deterministic or _stands_in(static, arch),
            sums_by_rows=static.varlen and (short or static.average_rows < row.block_m),
            writes_dq=short,
            row_tiles=8 // row.warps if short else 1,
        )

    def main_blocks(
        self, config: ConfigBackwardSm80, problem: Problem, counts: Counts, num_sms: int
    ) -> tuple[int, tuple[int, ...], int]:
        groups = -(-counts.tiles // config.row_tiles)
        finish = 0 if writes_all_dq(config, problem) else groups
        return groups, (counts.units,), max(counts.least, finish + counts.sinks)

    def values(self, config: Any, problem: Problem, grid: BackwardGrid) -> dict[str, Any]:
        no_map = bytes(MAP_BYTES)
        return super().values(config, problem, grid) | dict.fromkeys(("q", "k", "v", "dout"), no_map)

    def maps(self, config: Any, problem: Problem) -> tuple[Map, ...]:
        return ()


def _stands_in(static: Static, arch: int) -> bool:
    """Whether it serves in place of Hopper's two passes, whose dq is the same bits in every run.

    Blocks take turns only where sequences have several, as packed ones may.
    """
    wide = max(static.head_dim, static.head_dim_v) > WIDEST
    return (
        arch // 10 == 9 and has_short_tile(static) and static.element != "f32" and static.tma and wide and static.varlen
    )


def writes_all_dq(config: ConfigBackwardSm80, problem: Problem) -> bool:
    """Whether the main kernel writes every row of dq: each tile of queries has one that sees a key."""
    if (
        not config.writes_dq
        or problem.varlen
        or config.listed
        or config.mask not in ("none", "causal")
        or problem.seqlen_k == 0
    ):
        return False
    return not config.causal or problem.seqlen_q - problem.seqlen_k < config.block_m


class Tile(NamedTuple):
    """What a row of the table says."""

    block_m: int
    block_n: int
    warps: int
    score_row_warps: int
    score_column_warps: int
    key_row_warps: int
    dq_row_warps: int
    stages: int
    halves: bool = False
    score_halves: bool = False


def short_tile(static: Static) -> Tile:
    """One block of keys holds those of a short sequence, a warp 16 of them; some share them where columns are many."""
    row_warps, widest = static.short_keys // 16, max(static.head_dim, static.head_dim_v)
    column_warps = 1
    if widest > (64 if static.element == "f32" else 128):
        column_warps = 4 if widest > 192 and row_warps == 1 else 2
    block_m = static.short_rows if column_warps == 1 and row_warps <= 2 else 16
    return Tile(block_m, static.short_keys, row_warps * column_warps, row_warps, 1, row_warps, 1, 1)


def tile(static: Static, arch: int) -> Tile:
    """A row of the table whose tile divides the blocks that a term may list."""
    row, blocks = table_row(static, arch), listed_blocks(static.terms)
    if blocks is None or (blocks[0] % row.block_m == 0 and blocks[1] % row.block_n == 0):
        return row
    if max(static.head_dim, static.head_dim_v) <= 96:
        return Tile(64, 64, 8, 2, 4, 4, 4, 2)
    return Tile(64, 64, 8, 2, 4, 2, 2, 1)


def table_row(static: Static, arch: int) -> Tile:
    """The table of tiles. What was tried is in docs/backward.md."""
    widest = max(static.head_dim, static.head_dim_v)
    memory = SHARED_MEMORY[arch] >> 10
    if static.element == "f32":
        if widest <= 64:
            return Tile(64, 64, 8, 4, 2, 4, 4, 2 if memory > 99 else 1)
        if widest <= 128:
            return Tile(32, 64, 8, 4, 2, 4, 2, 2) if memory > 99 else Tile(32, 32, 8, 2, 2, 2, 2, 1)
        if widest <= 192:
            return Tile(32, 32, 8, 2, 2, 2, 2, 2) if memory > 99 else Tile(16, 32, 4, 2, 1, 2, 1, 1)
        return Tile(32, 32, 8, 2, 2, 2, 2, 1) if memory > 99 else Tile(16, 16, 8, 1, 1, 1, 1, 1)
    same = static.head_dim == static.head_dim_v  # so dk and dv take half of the warps each
    if widest <= 64:
        return Tile(128, 128, 8, 2, 4, 4, 4, 2, same) if memory > 99 else Tile(64, 128, 8, 4, 2, 4, 4, 2, same)
    if widest <= 96:
        return Tile(64, 128, 8, 4, 2, 4, 4, 2, same) if memory > 99 else Tile(64, 64, 8, 2, 4, 4, 4, 2)
    if widest <= 128:
        return Tile(64, 128, 8, 4, 2, 2 if same else 4, 2, 2, same) if memory > 99 else Tile(64, 64, 8, 2, 4, 2, 2, 1)
    if widest <= 192:
        same = same and widest > 160  # below, dk has 192 columns for dq's sake, and dv 160
        return Tile(64, 64, 8, 2, 4, 2, 2, 2, same) if memory > 99 else Tile(32, 64, 8, 4, 2, 2, 2, 1)
    if memory > 99 and same and not static.terms:
        return Tile(64, 64, 8, 2, 2, 1, 2, 1, same, True)
    return Tile(64, 64, 8, 1, 4, 1 if same else 2, 2, 1, same) if memory > 99 else Tile(32, 32, 8, 2, 2, 1, 1, 1)
