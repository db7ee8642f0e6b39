"""The kernels that merge states, and that differentiate merged ones: bound by memory, and for every GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .._call.arrays import contiguous
from .._call.problem import Problem, Static
from .chunks import ChunksGrid, ChunksKernel, ConfigChunks, grid_of, shared
from .kernel import four

WARP_SIZE = 32

NO_STEPS = (0, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class ConfigMerge(ConfigChunks):
    """What ``cuda_src/attention/states.cuh`` needs besides.

    Attributes
    ----------
    row_lanes : int
        Lanes that have a row together.
    """

    row_lanes: int


class MergeStates(ChunksKernel):
    """Merges states: ``cuda_src/attention/merge_states.cuh``."""

    name = "attention_merge_states"
    record = "MergeParams"

    def config(self, static: Static, arch: int) -> ConfigMerge:
        known = ConfigChunks(**shared(static, arch))
        chunks = static.head_dim_v // known.chunk
        return ConfigMerge(**vars(known), row_lanes=min(WARP_SIZE, 1 << (chunks - 1).bit_length()))

    def grid(self, config: ConfigMerge, problem: Problem, num_sms: int) -> ChunksGrid:
        return grid_of(config, _extents(problem, config.row_lanes), num_sms)

    def values(self, config: ConfigMerge, problem: Problem, grid: ChunksGrid) -> dict[str, Any]:
        strides, extents = problem.strides, _extents(problem, config.row_lanes)
        return {
            "states": _states(problem, config.chunk),
            "out_steps": _steps(strides.get("out") or contiguous(problem.out_shape), config.chunk),
            "lse_steps": _lse_steps(contiguous(problem.lse_shape)),
            "extents": extents,
            "chunks": problem.head_dim_v // config.chunk,
            "rounds": -(-math.prod(extents) // max(1, grid.blocks[0] * config.num_threads)),
        }


class MergeStatesBackward(MergeStates):
    """The gradients of that: ``cuda_src/attention/merge_states_backward.cuh``."""

    name = "attention_merge_states_backward"
    record = "MergeBackwardParams"

    def values(self, config: ConfigMerge, problem: Problem, grid: ChunksGrid) -> dict[str, Any]:
        strides, stacked = problem.strides, _stacked(problem)
        out, lse = (contiguous(problem.specs[name].shape) for name in ("out_a", "lse_a"))
        return {
            "states": _states(problem, config.chunk),
            "dout_steps": _steps(strides["dout"], config.chunk),
            "dlse_steps": _lse_steps(strides["dlse"]) if "dlse" in strides else NO_STEPS,
            "dstates_steps": _steps(out[stacked:], config.chunk),
            "dlse_states_steps": _lse_steps(lse[stacked:]),
            "dout_state_step": out[0] * stacked,
            "dlse_state_step": lse[0] * stacked,
            "extents": _extents(problem, config.row_lanes),
            "chunks": problem.head_dim_v // config.chunk,
        }


def _extents(problem: Problem, columns: int) -> tuple[int, ...]:
    """Of what a row is divided into, heads, rows and sequences."""
    return columns, problem.num_heads_q, problem.seqlen_q, problem.batch


def _steps(strides: Sequence[int], chunk: int) -> tuple[int, ...]:
    """Of out: along chunks, heads, rows and sequences."""
    batch, rows, heads, columns = four(strides)
    return columns * chunk, heads, rows, batch


def _lse_steps(strides: Sequence[int]) -> tuple[int, ...]:
    """The same of lse, of which all chunks of a row have one number."""
    heads, rows = strides[-2:]
    return 0, heads, rows, strides[0] if len(strides) == 3 else 0


def _stacked(problem: Problem) -> int:
    """1 if out_a and lse_a have a first axis of states, else 0."""
    return len(problem.specs["out_a"].shape) - len(problem.out_shape)


def _states(problem: Problem, chunk: int) -> dict[str, Any]:
    strides, stacked, has_b = problem.strides, _stacked(problem), "out_b" in problem.specs
    steps = {
        "out_a_steps": _steps(strides["out_a"][stacked:], chunk),
        "lse_a_steps": _lse_steps(strides["lse_a"][stacked:]),
    }
    steps["out_b_steps"] = _steps(strides["out_b"], chunk) if has_b else NO_STEPS
    steps["lse_b_steps"] = _lse_steps(strides["lse_b"]) if has_b else NO_STEPS
    return {
        **steps,
        "out_state_step": strides["out_a"][0] * stacked,
        "lse_state_step": strides["lse_a"][0] * stacked,
        "count": (problem.specs["out_a"].shape[0] if stacked else 1) + has_b,
    }
