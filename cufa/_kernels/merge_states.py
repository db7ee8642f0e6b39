"""The kernels that merge states, and that differentiate merged ones: bound by memory, and for every GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .._call.arrays import contiguous
from .._call.problem import Problem, Static
from .chunks import ChunksGrid, ChunksKernel, ConfigChunks, grid_of, shared
from .kernel import four

WARP_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class ConfigMergeBackward(ConfigChunks):
    """What ``cuda_src/attention/merge_states_backward.cuh`` needs besides.

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

    def grid(self, config: ConfigChunks, problem: Problem, num_sms: int) -> ChunksGrid:
        return grid_of(config, _extents(problem, problem.head_dim_v // config.chunk), num_sms)

    def values(self, config: ConfigChunks, problem: Problem, grid: ChunksGrid) -> dict[str, Any]:
        strides = problem.strides
        return {
            "states": _states(problem, config.chunk),
            "out_steps": _steps(strides.get("out") or contiguous(problem.out_shape), config.chunk),
            "lse_steps": _lse_steps(contiguous(problem.lse_shape)),
            "extents": _extents(problem, problem.head_dim_v // config.chunk),
        }


class MergeStatesBackward(ChunksKernel):
    """The gradients of that: ``cuda_src/attention/merge_states_backward.cuh``."""

    name = "attention_merge_states_backward"
    record = "MergeBackwardParams"

    def config(self, static: Static, arch: int) -> ConfigMergeBackward:
        known = ConfigChunks(**shared(static, arch))
        chunks = static.head_dim_v // known.chunk
        return ConfigMergeBackward(**vars(known), row_lanes=min(WARP_SIZE, 1 << (chunks - 1).bit_length()))

    def grid(self, config: ConfigMergeBackward, problem: Problem, num_sms: int) -> ChunksGrid:
        return grid_of(config, _extents(problem, config.row_lanes), num_sms)

    def values(self, config: ConfigMergeBackward, problem: Problem, grid: ChunksGrid) -> dict[str, Any]:
        strides, stacked = problem.strides, 0 if "out_b" in problem.specs else 1
        out, lse = (contiguous(problem.specs[name].shape) for name in ("out_a", "lse_a"))
        return {
            "states": _states(problem, config.chunk),
            "dout_steps": _steps(strides["dout"], config.chunk),
            "dlse_steps": _lse_steps(strides["dlse"]) if "dlse" in strides else (0, 0, 0, 0),
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


def _states(problem: Problem, chunk: int) -> dict[str, Any]:
    strides, two = problem.strides, "out_b" in problem.specs
    stacked = 0 if two else 1
    steps = {f"out_{side}_steps": _steps(strides[f"out_{side if two else 'a'}"][stacked:], chunk) for side in "ab"}
    steps |= {f"lse_{side}_steps": _lse_steps(strides[f"lse_{side if two else 'a'}"][stacked:]) for side in "ab"}
    return {
        **steps,
        "out_state_step": strides["out_a"][0] * stacked,
        "lse_state_step": strides["lse_a"][0] * stacked,
        "count": 2 if two else problem.specs["out_a"].shape[0],
    }
