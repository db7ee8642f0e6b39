"""What the forward's kernels share: how a problem is divided into tiles, and in which order blocks go through them."""

from __future__ import annotations

import heapq
from typing import NamedTuple

from .._call.problem import Problem
from ..errors import UnsupportedError
from .kernel import MAX_GRID, SIZEOF, Config

MAX_LISTED_BLOCKS = 160
"""Blocks whose tiles a launch can list: ``Deal`` in cuda_src/attention/tma_params.cuh."""

LISTED_GAIN = 0.98
"""What a list may at most leave of the time of the last rounds, to be worth it."""

TILE_OVERHEAD = 1.2
"""What a tile's beginning and end take, in blocks of keys."""

MAX_L2_SECTION = 16 << 20
NARROW_DIM, NARROW_HEADS = 64, 16
"""Dense heads this narrow, under a causal mask, go side by side in such numbers, as far as `MAX_L2_SECTION` bytes hold
their K and V: up to 1.5% faster (docs/forward_sm90.md, *Order of the tiles*)."""


class Grid(NamedTuple):
    """Shape of a launch; see cuda_src/attention/scheduler.cuh.

    Attributes
    ----------
    num_blocks : int
    m_blocks, m_units : int
        Tiles of queries per head, and units.
    heads_per_section : int
    round_units : int
        Units that are dealt to the blocks round by round.
    listed : tuple of tuple of int
        For each block, the tiles it takes after that; empty if there are none for any.
    units_per_block : int
        Units that a block of the kernel for sm_80 takes one after the other, if its sequences are `many`.
    """

    num_blocks: int
    m_blocks: int
    m_units: int
    heads_per_section: int
    round_units: int
    listed: tuple[tuple[int, ...], ...] = ()
    units_per_block: int = 1

    @property
    def blocks(self) -> tuple[int, ...]:
        return (self.num_blocks,)


def tiles_of(config: Config, problem: Problem) -> tuple[int, int]:
    """Tiles of queries of a head (packed: of all sequences together), and of all heads.

    Raises
    ------
    UnsupportedError
        If they are more than one launch holds.
    """
    if problem.varlen:
        # Always enough tiles, without knowing one length: see attention/packed.cuh.
        m_blocks = problem.seqlen_q // config.block_m + problem.batch
        num_tiles = m_blocks * problem.num_heads_q
    else:
        m_blocks = -(-problem.seqlen_q * config.pack // config.block_m)
        num_tiles = m_blocks * (problem.batch * problem.num_heads_q // config.pack)
    if num_tiles > MAX_GRID:
        raise UnsupportedError(
            f"{problem.function}: {num_tiles} tiles of queries are more than one launch holds ({MAX_GRID}); split the "
            "batch."
        )
    return m_blocks, num_tiles


def least_blocks(problem: Problem) -> int:
    """Someone has to clear the rows that are no sequence's, even where there is no tile."""
    return 1 if problem.varlen and problem.seqlen_q * problem.num_heads_q > 0 else 0


def heads_per_section(config: Config, problem: Problem, section_bytes: int, keys: int | None = None) -> int:
    """Query heads scheduled side by side: as many as `section_bytes` hold K and V of, in sections of equal size.

    `keys` are those of a sequence, by default all of dense k, or the average of packed ones.
    """
    heads = problem.num_heads_q if problem.varlen else problem.batch * problem.num_heads_q // config.pack
    average = problem.seqlen_k // max(1, problem.batch) if problem.varlen else problem.seqlen_k
    seqlen_k = average if keys is None else keys
    size = SIZEOF[config.element]
    head_bytes = max(1, seqlen_k * (config.head_dim + config.head_dim_v) * size)
    ratio = max(1, problem.num_heads_q // max(1, problem.num_heads_k) // config.pack)
    key_heads = -(-heads // ratio)
    if config.causal and max(config.head_dim, config.head_dim_v) <= NARROW_DIM and not problem.varlen:
        section_bytes = max(section_bytes, min(NARROW_HEADS // ratio * head_bytes, MAX_L2_SECTION))
    sections = max(1, -(-key_heads // max(1, section_bytes // head_bytes)))
    return max(1, -(-key_heads // sections) * ratio)


def share_out(grid: Grid, config: Config, problem: Problem) -> Grid:
    """List the tiles of the last round of units, and of what is left over, where that makes the blocks end earlier.

    The longest come first, each to the block that has least to do. Otherwise units stay whole: a list mixes more heads,
    whose K and V the L2 then has to hold.
    """
    heads = problem.batch * problem.num_heads_q // config.pack
    round_units = max(0, grid.round_units // max(1, grid.num_blocks) - 1) * grid.num_blocks
    tiles = []
    round_loads = [0.0] * grid.num_blocks
    for unit in range(round_units, grid.round_units):
        section, within = divmod(unit, grid.heads_per_section * grid.m_units)
        first = within // min(grid.heads_per_section, heads - section * grid.heads_per_section)
        last = grid.m_blocks - 1 - first
        for second, m_block in enumerate((last, first) if grid.m_units < grid.m_blocks and first < last else (last,)):
            cost = key_blocks(problem, config, m_block) + TILE_OVERHEAD
            tiles.append((cost, 2 * (unit - round_units) + second))
            round_loads[unit % grid.num_blocks] += cost
    tiles.sort(key=lambda tile: -tile[0])
    loads = [(0.0, block) for block in range(grid.num_blocks)]
    listed: list[list[int]] = [[] for _ in range(grid.num_blocks)]
    for cost, entry in tiles:
        load, block = loads[0]
        listed[block].append(entry)
        heapq.heapreplace(loads, (load + cost, block))
    if max(loads, default=(0.0, 0))[0] > LISTED_GAIN * max(round_loads, default=0.0):
        return grid
    return grid._replace(round_units=round_units, listed=tuple(map(tuple, listed)))


def key_blocks(problem: Problem, config: Config, m_block: int) -> int:
    """Blocks of keys that a tile of queries sees: block_range in cuda_src/attention/block_range.cuh."""
    diagonal = problem.seqlen_k - problem.seqlen_q
    first_row = m_block * config.block_m // config.pack
    last_row = min(((m_block + 1) * config.block_m - 1) // config.pack, problem.seqlen_q - 1)
    left, right = problem.window_left, problem.window_right
    first = 0 if left is None else max(0, first_row + diagonal - left)
    end = problem.seqlen_k if right is None else min(problem.seqlen_k, last_row + diagonal + right + 1)
    return max(0, -(-end // config.block_n) - first // config.block_n)
