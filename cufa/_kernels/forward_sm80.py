"""The forward for sm_80 and newer: mma.sync, and cp.async of whatever width the arrays allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .._call.problem import CHAIN_ROWS, Problem, Static
from .forward import Grid, heads_per_section, least_blocks, tiles_of
from .kernel import (
    SHARED_MEMORY,
    SIZEOF,
    Config,
    Kernel,
    common,
    dividing,
    has_short_tile,
    known_arch,
    listed_blocks,
    reason_for_every_gpu,
    round_up,
)
from .params import params_of

PASSED_SEQUENCES = 256
"""Packed sequences that a block may pass for each of its tiles, on the way to the first of them."""

RESIDENT_THREADS = 1024
"""Threads per SM for which such blocks should be enough, before they are spared the way."""

L2_SECTION = 16 << 20
"""Bytes of K and V that heads running side by side may share, as the L2 of every GPU from sm_80 holds. More give a
causal mask better balance where blocks do not come in rounds."""


@dataclass(frozen=True, kw_only=True)
class ConfigSm80(Config):
    """What ``cuda_src/attention/forward_sm80.cuh`` needs besides.

    Attributes
    ----------
    column_warps : int
        Warps that share rows and split the columns of v.
    copy_bytes : int
    copy_unroll : int
        Passes over a tile's rows that are copied at a time.
    many : bool
        Whether a thread block takes several tiles, one after the other.
    scan_groups : int
        Of 32 offsets each, that a warp asks for at a time when it looks for a packed sequence.
    early_v : bool
        Whether a tile's first block of V is loaded with that of K.
    stages : int
        Buffers that K and V have each.
    held_cols : int
        Columns of q that stay in registers.
    votes : bool
        Whether a warp whose rows have no new maximum leaves out as it is. Else it always rescales, without a branch.
    """

    column_warps: int
    copy_bytes: int
    copy_unroll: int
    many: bool
    scan_groups: int
    early_v: bool
    stages: int
    held_cols: int
    votes: bool


class ForwardSm80(Kernel):
    """The forward for every GPU."""

    name = "attention_forward_sm80"
    record = "Params"

    def reason(self, static: Static, arch: int) -> str:
        return reason_for_every_gpu(static, arch)

    def config(self, static: Static, arch: int) -> ConfigSm80:
        arch = known_arch(arch)
        block_m, block_n, warps, column_warps = tile(static, arch)
        if blocks := listed_blocks(static.terms):
            block_m, block_n = dividing(block_m, blocks[0]), dividing(block_n, blocks[1])
        size = SIZEOF[static.element]
        tile_head_dim = round_up(static.head_dim, 32)
        # Warps that share columns have whole panels of them, of 128 bytes.
        tile_head_dim_v = round_up(static.head_dim_v, 32 if column_warps == 1 else 128 // size * column_warps)
        stages = _stages(static, arch)
        tiles = block_m * tile_head_dim + stages * block_n * (tile_head_dim + tile_head_dim_v)
        return ConfigSm80(
            **common(static),
            tile_head_dim=tile_head_dim,
            tile_head_dim_v=tile_head_dim_v,
            block_m=block_m,
            block_n=block_n,
            num_threads=32 * warps,
            column_warps=column_warps,
            smem_bytes=size * max(tiles, block_m * tile_head_dim_v),
            copy_bytes=static.copy_bytes,
            copy_unroll=_copy_unroll(static, arch),
            many=static.many,
            scan_groups=8 if has_short_tile(static) else 2,  # many offsets, and registers to hold them
            early_v=has_short_tile(static),  # most have no other block whose products it could arrive beside
            stages=stages,
            held_cols=_held_cols(static, arch),
            votes=_is_plain(static) and static.head_dim > (64 if arch >= 90 else 128),  # else a vote costs spills
        )

    def grid(self, config: ConfigSm80, problem: Problem, num_sms: int) -> Grid:
        m_blocks, num_tiles = tiles_of(config, problem)
        section = heads_per_section(config, problem, L2_SECTION)
        units_per_block = 1
        if config.many:
            resident = num_sms * RESIDENT_THREADS // config.num_threads
            units_per_block = max(1, min(problem.batch // PASSED_SEQUENCES, num_tiles // max(1, resident)))
        blocks = max(least_blocks(problem), -(-num_tiles // units_per_block))
        return Grid(blocks, m_blocks, m_blocks, section, num_tiles, units_per_block=units_per_block)

    def values(self, config: ConfigSm80, problem: Problem, grid: Grid) -> dict[str, Any]:
        section, units = grid.heads_per_section, grid.units_per_block
        return params_of(problem, m_blocks=grid.m_blocks, heads_per_section=section, units_per_block=units)

    def asserts(self) -> str:
        return f"static_assert(tile::chain_rows == {CHAIN_ROWS});\n"


def tile(static: Static, arch: int) -> tuple[int, int, int, int]:
    """The table of tiles: (block_m, block_n, warps, column_warps).

    Bounded by registers (255 per thread; an accumulator of m × n costs m·n / threads of them) and by shared memory.
    Every row compiles without spills. What was tried and is slower is in docs/forward_sm80.md.
    """
    widest = max(static.head_dim, static.head_dim_v)
    if has_short_tile(static):
        # A warp for every 16 rows: dozens of thread blocks share an SM and hide each other's latency. Short copies take
        # registers that the widest output leaves to two warps only.
        column_warps = 2 if widest > 128 and static.copy_bytes < 16 else 1
        return static.short_rows, min(static.short_keys, 32), static.short_rows // 16 * column_warps, column_warps
    if static.element == "f32":
        if widest <= 64:
            return 64, 64, 4, 1
        if widest <= 96:
            return 64, 48, 4, 1
        if widest <= 128:
            return 64, 32, 4, 1
        if widest <= 192:
            return 64, 32, 8, 2
        return 64, 16, 4, 1
    plain = _is_plain(static)
    if widest <= 64:
        return 128, 128 if plain else 96, 4, 1
    if widest <= 96:
        return 128, 64, 4, 1
    if widest <= 128:
        if SHARED_MEMORY[arch] <= 99 << 10:
            return 128, 32, 4, 1  # 48 KB: two blocks share an SM
        if plain and (arch == 90 or (static.mask == "none" and not static.varlen and arch < 90)):  # others spill
            return 128, 64, 4, 1
        spills = static.mask == "window" or (static.varlen and arch >= 100 and not plain)
        return 128, 32 if spills else 48, 4, 1
    if widest > 192 and static.copy_bytes < 16:
        return 64, 64, 8, 2  # the addresses of what is copied in pieces take registers
    return 64, 64, 4, 1


def _is_plain(static: Static) -> bool:
    """Whether a kernel is of the plainest: the largest tiles leave no register over, and others would spill."""
    return (
        static.element != "f32"
        and static.head_dim == static.head_dim_v
        and static.copy_bytes == static.store_bytes == 16
        and static.mask != "window"
        and not static.terms
        and not static.many
        and not has_short_tile(static)
    )


def _stages(static: Static, arch: int) -> int:
    """Two at head_dim 64, if two thread blocks still share an SM: the tiles then are 640 rows of 128 bytes, 80 KB."""
    if not _is_plain(static) or static.varlen or static.head_dim != 64:
        return 1
    return 2 if SHARED_MEMORY[arch] >= 2 * (80 << 10) else 1


def _held_cols(static: Static, arch: int) -> int:
    """Columns of Q that stay in registers, as many as there are."""
    if not _is_plain(static) or static.head_dim <= 192:
        return 0
    return 160 if static.mask == "causal" and arch >= 100 else 192


def _copy_unroll(static: Static, arch: int) -> int:
    if static.copy_bytes < 16 or static.element == "f32":
        return 1  # short copies are many as it is
    if has_short_tile(static):
        return 4
    if static.many:
        return 1  # its loop needs registers
    if 96 < max(static.head_dim, static.head_dim_v) <= 128 and not _is_plain(static):  # the fullest tiles
        return 2 if arch >= 90 or static.varlen else 4
    return 8
