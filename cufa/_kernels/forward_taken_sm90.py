"""What kernels for Hopper share whose thread blocks take tiles as they come, as the host knows no costs of tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

from .._call.problem import Problem
from .forward_cache_sm80 import scratch_of
from .forward_sm90 import ConfigSm90, ForwardSm90
from .kernel import Scratch, Step
from .params import params_of

READY_THREADS = 32


class TakenGrid(NamedTuple):
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


class ForwardTakenSm90(ForwardSm90):
    """Of these kernels, all but what they are for and how heads run side by side."""

    record = "TakenTmaParams"
    prologue = "  ptx::grid_begin();\n"
    special = True
    may_stage = False  # the record has no map of scores

    def steps(self, config: ConfigSm90) -> tuple[Step, ...]:
        return (Step("attention_taken_begin", READY_THREADS), *super().steps(config))

    def values(self, config: ConfigSm90, problem: Problem, grid: Any) -> dict[str, Any]:
        params = params_of(problem, m_blocks=grid.m_blocks, heads_per_section=grid.heads_per_section)
        return {"params": params, "units": grid.units}

    def scratch(self, config: Any, problem: Problem, grid: Any) -> Scratch:
        return scratch_of({"dealt": 1 + grid.num_blocks + grid.units})
