"""The gradients for Hopper in two passes, over blocks of keys and over tiles of queries: nothing adds up in memory."""

from __future__ import annotations

from dataclasses import dataclass

from .._call.problem import MAX_HEAD_DIM, Problem, Static
from .backward import ROW_THREADS, BackwardKernel, Counts
from .backward_sm90 import ConfigBackwardSm90, barriers_bytes
from .forward_sm90 import REGISTERS, STAGES
from .kernel import SIZEOF, WARPGROUP_ROWS, Step, blocks_in, common, needs_maps, refuses_blocks, round_up

SPLIT_QUERIES = 128
"""Queries per block of the second pass: ``QueriesConfig`` in attention/backward_split_queries_sm90.cuh."""


@dataclass(frozen=True, kw_only=True)
class ConfigBackwardSplitSm90(ConfigBackwardSm90):
    """What ``cuda_src/attention/backward_split_sm90.cuh`` needs besides.

    Attributes
    ----------
    value_stages : int
        Stages of v in the pass over queries, where k has `STAGES`.
    """

    value_stages: int


class BackwardSplitSm90(BackwardKernel):
    """The gradients of 16-bit arrays on Hopper where one pass does not serve. They are the same bits in every run."""

    name = "attention_backward_split_sm90"
    main_entries = ("attention_backward_split_keys_sm90", "attention_backward_split_queries_sm90")
    target_suffix = "a"
    sums_dq = False
    unit_counts = 2

    def runs_on(self, arch: int) -> bool:
        return arch // 10 == 9

    def refusal(self, static: Static) -> str:
        if any(term.reads_score for term in static.terms):
            return "the warpgroup that tells score terms their gradients has no scores for those that read them"
        return needs_maps(static) or refuses_blocks(static, SPLIT_QUERIES, WARPGROUP_ROWS)

    def config(self, static: Static, arch: int) -> ConfigBackwardSplitSm90:
        block = WARPGROUP_ROWS
        size = SIZEOF[static.element]
        tile_head_dim, tile_head_dim_v = round_up(static.head_dim, 64), round_up(static.head_dim_v, 64)
        both = tile_head_dim + tile_head_dim_v
        # One warpgroup hands two operands to the other: factors of dS in float32, or packed with derivatives.
        weights, rows = 2 * size * STAGES * block * block, 2 * 4 * STAGES * block
        keys = size * (1 + STAGES) * block * both + weights + rows + barriers_bytes(*[STAGES] * 3, 1, 1)
        value_stages = STAGES if both < 2 * MAX_HEAD_DIM else 1  # all that fits
        queries = size * (SPLIT_QUERIES * both + block * (STAGES * tile_head_dim + value_stages * tile_head_dim_v))
        queries += barriers_bytes(STAGES, value_stages, *[1] * 4)
        units = barriers_bytes(STAGES, 1)
        producer_registers, consumer_registers = REGISTERS[2]
        return ConfigBackwardSplitSm90(
            **common(static),
            tile_head_dim=tile_head_dim,
            tile_head_dim_v=tile_head_dim_v,
            block_m=block,
            block_n=block,
            num_threads=3 * 128,
            smem_bytes=max(keys, queries) + units,
            copy_bytes=static.copy_bytes,
            out_copy_bytes=static.out_copy_bytes,
            deterministic=False,  # in no order: nothing is added up in memory
            dq_threads=2 * 128,
            producer_registers=producer_registers,
            consumer_registers=consumer_registers,
            value_stages=value_stages,
        )

    def finish_threads(self, config: ConfigBackwardSm90) -> int:
        return ROW_THREADS

    def main_steps(self, config: ConfigBackwardSm90) -> tuple[Step, ...]:
        keys, queries = super().main_steps(config)
        # The second pass needs nothing of the first, so it begins while that runs, and it sees to the order of grids.
        return keys, queries._replace(waits=True)

    def main_blocks(
        self, config: ConfigBackwardSm90, problem: Problem, counts: Counts, num_sms: int
    ) -> tuple[int, tuple[int, ...], int]:
        outer = 1 if problem.varlen else problem.batch
        queries = blocks_in(problem.seqlen_q, SPLIT_QUERIES, problem) * problem.num_heads_q * outer
        # One block per SM takes one unit after the other, counted from where the first kernel sets 0.
        main = min(counts.units, num_sms), min(queries, num_sms)
        return max(counts.tiles, min(counts.units, 1)), main, max(counts.least, counts.sinks)
