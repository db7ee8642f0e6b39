"""The forward for Hopper where packed sequences have many tiles, of which the host does not know what they cost."""

from __future__ import annotations

from typing import Any

from .._call.problem import Problem, Static
from .forward import heads_per_section, least_blocks, tiles_of
from .forward_sm90 import L2_SECTION, ConfigSm90
from .forward_taken_sm90 import ForwardTakenSm90, TakenGrid


class ForwardPackedSm90(ForwardTakenSm90):
    """The forward for packed sequences of many tiles in 16-bit arrays on Hopper."""

    name = "attention_forward_packed_sm90"

    def refusal(self, static: Static) -> str:
        if not static.many_tiles:
            return "it is for packed sequences of many tiles"
        return super().refusal(static)

    def grid(self, config: ConfigSm90, problem: Problem, num_sms: int) -> Any:
        m_blocks, num_tiles = tiles_of(config, problem)
        section = heads_per_section(config, problem, L2_SECTION)
        return TakenGrid(max(least_blocks(problem), min(num_tiles, num_sms)), m_blocks, section, num_tiles)
