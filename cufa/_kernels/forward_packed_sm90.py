"""The forward for Hopper where packed sequences have many tiles, of which the host does not know what they cost."""

from __future__ import annotations

from typing import Any, NamedTuple

from .._call.problem import Problem, Static
from .forward import heads_per_section, least_blocks, tiles_of
from .forward_cache_sm80 import scratch_of
from .forward_sm90 import L2_SECTION, ConfigSm90, ForwardSm90
from .kernel import Scratch, Step
from .params import params_of

READY_THREADS = 32


class PackedGrid(NamedTuple):
    """Shapes of the launches.

    Attributes
    ----------
    num_blocks : int
        Thread blocks of the main launch.
    m_blocks : int
        Tiles of queries per head.
    heads_per_section : int
    units : int
        Tiles of all heads, which thread blocks take one by one.
    """

    num_blocks: int
    m_blocks: int
    heads_per_section: int
    units: int

    @property
    def blocks(self) -> tuple[int, ...]:
        return (min(self.num_blocks, 1), self.num_blocks)


class ForwardPackedSm90(ForwardSm90):
    """The forward for packed sequences of many tiles in 16-bit arrays on Hopper."""

    name = "attention_forward_packed_sm90"
    record = "PackedTmaParams"
    prologue = "  ptx::grid_begin();\n"
    special = True
    may_stage = False  # its record has no map of scores

    def refusal(self, static: Static) -> str:
        if not static.many_tiles:
            return "it is for packed sequences of many tiles"
        return super().refusal(static)

    def steps(self, config: ConfigSm90) -> tuple[Step, ...]:
        return (Step("attention_packed_begin", READY_THREADS), *super().steps(config))

    def grid(self, config: ConfigSm90, problem: Problem, num_sms: int) -> Any:
        m_blocks, num_tiles = tiles_of(config, problem)
        section = heads_per_section(config, problem, L2_SECTION)
        return PackedGrid(max(least_blocks(problem), min(num_tiles, num_sms)), m_blocks, section, num_tiles)

    def values(self, config: ConfigSm90, problem: Problem, grid: Any) -> dict[str, Any]:
        params = params_of(problem, m_blocks=grid.m_blocks, heads_per_section=grid.heads_per_section)
        return {"params": params, "units": grid.units}

    def scratch(self, config: Any, problem: Problem, grid: Any) -> Scratch:
        return scratch_of({"dealt": 1 + grid.num_blocks + grid.units})
