"""The forward for Hopper over the blocks of keys that a list says, where the host does not know what tiles cost."""

from __future__ import annotations

from typing import Any, NamedTuple

from .._call.problem import Problem, Static
from .forward import heads_per_section, tiles_of
from .forward_cache_sm80 import scratch_of
from .forward_sm90 import ConfigSm90, ForwardSm90
from .kernel import Scratch, Step, listed_blocks
from .params import params_of

SECTION = 16 << 20
"""Bytes of K and V that heads running side by side may share: a few heads, so that blocks end evenly."""

LEAST_HEADS = 4
"""Heads that run side by side, however long they are."""

READY_THREADS = 32


class ListedGrid(NamedTuple):
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


class ForwardListedSm90(ForwardSm90):
    """The forward for 16-bit arrays on Hopper over listed blocks."""

    name = "attention_forward_listed_sm90"
    record = "ListedTmaParams"
    prologue = "  ptx::grid_begin();\n"
    special = True
    may_stage = False  # its record has no map of scores

    def refusal(self, static: Static) -> str:
        if listed_blocks(static.terms) is None:
            return "it is for masks whose blocks are listed"
        return super().refusal(static)

    def steps(self, config: ConfigSm90) -> tuple[Step, ...]:
        return (Step("attention_listed_begin", READY_THREADS), *super().steps(config))

    def grid(self, config: ConfigSm90, problem: Problem, num_sms: int) -> Any:
        m_blocks, num_tiles = tiles_of(config, problem)
        heads = max(1, problem.batch * problem.num_heads_q // config.pack)
        section = max(heads_per_section(config, problem, SECTION), min(LEAST_HEADS, heads))
        return ListedGrid(min(num_tiles, num_sms), m_blocks, section, num_tiles)

    def values(self, config: ConfigSm90, problem: Problem, grid: Any) -> dict[str, Any]:
        params = params_of(problem, m_blocks=grid.m_blocks, heads_per_section=grid.heads_per_section)
        return {"params": params, "units": grid.units}

    def scratch(self, config: Any, problem: Problem, grid: Any) -> Scratch:
        return scratch_of({"dealt": 1 + grid.num_blocks + grid.units})
