"""The forward for Hopper over the blocks of keys that a list says, where the host does not know what tiles cost."""

from __future__ import annotations

from typing import Any

from .._call.problem import Problem, Static
from .forward import heads_per_section, tiles_of
from .forward_sm90 import ConfigSm90
from .forward_taken_sm90 import ForwardTakenSm90, TakenGrid
from .kernel import listed_blocks

SECTION = 16 << 20
"""Bytes of K and V that heads running side by side may share: a few heads, so that blocks end evenly."""

LEAST_HEADS = 4
"""Heads that run side by side, however long they are."""


class ForwardListedSm90(ForwardTakenSm90):
    """The forward for 16-bit arrays on Hopper over listed blocks."""

    name = "attention_forward_listed_sm90"

    def refusal(self, static: Static) -> str:
        if listed_blocks(static.terms) is None:
            return "it is for masks whose blocks are listed"
        return super().refusal(static)

    def grid(self, config: ConfigSm90, problem: Problem, num_sms: int) -> Any:
        m_blocks, num_tiles = tiles_of(config, problem)
        heads = max(1, problem.batch * problem.num_heads_q // config.pack)
        section = max(heads_per_section(config, problem, SECTION), min(LEAST_HEADS, heads))
        return TakenGrid(min(num_tiles, num_sms), m_blocks, section, num_tiles)
