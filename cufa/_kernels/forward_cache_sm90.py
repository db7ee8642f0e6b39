"""The forward over caches of keys and values for Hopper: that for arrays, with keys that lie in caches or pages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from .._call.arrays import ALIGNMENT
from .._call.kvcache import KVCacheProblem
from .._call.problem import Problem, Static
from .._driver.launch import Argument
from ..errors import UnsupportedError
from . import tensor_map
from .forward import heads_per_section, least_blocks, tiles_of
from .forward_cache_sm80 import (
    PREPARE_THREADS,
    members_of,
    query_name,
    query_strides,
    renamed,
    rotated,
    scratch_of,
    tokens_of,
)
from .forward_sm90 import L2_SECTION, ConfigSm90, ForwardSm90
from .kernel import MAX_GRID, WARPGROUP_ROWS, Map, Scratch, Step, needs_maps
from .record import Record

APPENDING = "attention_cache_append"

PAGED_STEP = 32
"""Keys that a block of pages has are a multiple of so many where they can be, lest its boxes are small and many."""

PAGED_REGISTERS = {False: (40, 232), True: (56, 224)}
"""As REGISTERS of the forward for arrays, by whether tiles are at most 64 wide: where there are pages to find, loading
takes more. So two warpgroups consume, even where rows are narrow."""

LEAST_BOX = 8
"""Rows of a box of a page at least: so many the swizzle of tiles takes to repeat."""


@dataclass(frozen=True, kw_only=True)
class ConfigCacheSm90(ConfigSm90):
    """What ``cuda_src/attention/forward_cache_sm90.cuh`` needs besides.

    Attributes
    ----------
    page_rows : int
        Rows of a page that are loaded together; 0 where caches are contiguous.
    prepare_threads : int
        Threads of a block of the launch that appends.
    """

    page_rows: int
    prepare_threads: int = PREPARE_THREADS

    def words(self) -> list[str]:
        return super().words() + ["paged"] * (self.page_rows > 0)

    def types(self) -> dict[str, str]:
        return super().types() | {"kv_element": self.element}


class CacheTileGrid(NamedTuple):
    """Shapes of the launches.

    Attributes
    ----------
    tokens : int
        Rows for which something is appended or rotated, a thread block each.
    num_blocks : int
        Thread blocks of the main launch.
    m_blocks : int
        Tiles of queries per head.
    heads_per_section : int
    units : int
        Tiles of all heads, which thread blocks take one by one.
    """

    tokens: int
    num_blocks: int
    m_blocks: int
    heads_per_section: int
    units: int

    @property
    def blocks(self) -> tuple[int, ...]:
        first = self.tokens + 1  # one of them readies the units
        return (first if self.tokens + self.num_blocks else 0, self.num_blocks)


class ForwardCacheSm90(ForwardSm90):
    """The forward over caches, for 16-bit arrays on Hopper where queries are many."""

    name = "attention_forward_cache_sm90"
    may_stage = False  # the warp that would do so loads pages
    may_own = False
    record = "CacheTmaParams"
    prologue = "  ptx::grid_begin();\n"

    def refusal(self, static: Static) -> str:
        if not static.full_tiles:
            return "queries are too few to fill large tiles, or not so many that the keys of each need no division"
        if static.kv_element:
            return "wgmma reads keys and values from shared memory, and caches of float8 are converted in registers"
        if static.q_copy_bytes < ALIGNMENT and not static.rotary:
            return "rows of q are not aligned to 16 bytes, as the tensor memory accelerator wants them"
        if why := needs_maps(static):
            return why
        if static.page_rows and static.page_rows < LEAST_BOX:
            return f"tensor copies load {LEAST_BOX} rows at least, which these pages or cache_leftpad tear apart"
        return ""

    def tile(self, static: Static) -> tuple[int, int, int, bool]:
        block_m, block_n, early_steps, whole_turns = super().tile(static)
        if static.page_rows:
            block_m, block_n = 2 * WARPGROUP_ROWS, block_n // PAGED_STEP * PAGED_STEP
            if static.terms and max(static.head_dim, static.head_dim_v) > 192:
                block_n -= 16  # or these would lack a register
        return block_m, block_n, early_steps, whole_turns

    def config(self, static: Static, arch: int) -> ConfigCacheSm90:
        members = vars(super().config(static, arch))
        page_rows = math.gcd(members["block_n"], static.page_rows) if static.page_rows else 0
        if page_rows:
            narrow = max(members["tile_head_dim"], members["tile_head_dim_v"]) <= 64
            registers = PAGED_REGISTERS[narrow]
            members = members | dict(zip(("producer_registers", "consumer_registers"), registers, strict=True))
        return ConfigCacheSm90(**members, page_rows=page_rows)

    def steps(self, config: ConfigSm90) -> tuple[Step, ...]:
        return (Step(APPENDING, PREPARE_THREADS), *super().steps(config))

    def grid(self, config: ConfigSm90, problem: Problem, num_sms: int) -> Any:
        assert isinstance(problem, KVCacheProblem)
        m_blocks, num_tiles = tiles_of(config, problem)
        section = heads_per_section(config, problem, L2_SECTION, problem.seqlen_k)
        blocks = max(least_blocks(problem), min(num_tiles, num_sms))
        tokens = tokens_of(problem)
        if tokens >= MAX_GRID:
            raise UnsupportedError(
                f"{problem.function}: {tokens} new rows are more than one launch appends ({MAX_GRID}); split the batch."
            )
        return CacheTileGrid(tokens, blocks, m_blocks, section, num_tiles)

    def values(self, config: ConfigSm90, problem: Problem, grid: Any) -> dict[str, Any]:
        assert isinstance(problem, KVCacheProblem)
        no_plan = dict.fromkeys(("makes_plan", "divides", "plan_blocks", "least_blocks", "least_positions"), 0)
        members = members_of(problem, no_plan, m_blocks=grid.m_blocks, heads_per_section=grid.heads_per_section)
        return {"caches": members, "units": grid.units}

    def maps(self, config: ConfigSm90, problem: Problem) -> tuple[Map, ...]:
        assert isinstance(problem, KVCacheProblem) and isinstance(config, ConfigCacheSm90)
        q = query_name(problem), query_strides(problem)
        return tensor_map.of_caches(problem, config, q, config.page_rows or config.block_n)

    def argument(self, record: Record, config: Any, problem: Problem, grid: Any) -> Argument:
        assert isinstance(problem, KVCacheProblem)
        # Packed sequences are found by the offsets of q alone, which stand for those of k.
        argument = renamed(super().argument(record, config, problem, grid), problem)
        names = {"cu_seqlens_k": "cu_seqlens_q"}
        return argument._replace(pointers=tuple((offset, names.get(name, name)) for offset, name in argument.pointers))

    def scratch(self, config: Any, problem: Problem, grid: Any) -> Scratch:
        assert isinstance(problem, KVCacheProblem)
        return scratch_of({"dealt": 1 + grid.num_blocks + grid.units} | rotated(problem))
