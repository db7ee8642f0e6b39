"""The kernel of rotary embeddings: bound by memory, and for every GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from .._call.arrays import contiguous
from .._call.problem import Problem, Static
from .._call.rotary import RotaryProblem
from .._driver.launch import Argument
from .chunks import ChunksKernel, ConfigChunks, grid_of, shared
from .kernel import NO_SCRATCH, Scratch, Step, four
from .record import Record


@dataclass(frozen=True, kw_only=True)
class ConfigRotary(ConfigChunks):
    """What ``cuda_src/attention/rotary.cuh`` needs besides.

    Attributes
    ----------
    interleaved : bool
        Whether the columns of a pair lie side by side; else halfway apart.
    """

    interleaved: bool


class RotaryGrid(NamedTuple):
    """How rows are divided.

    Attributes
    ----------
    blocks : tuple of int
        Of the kernel that finds positions of packed rows, if there is need of one, and of the one that turns.
    extents : tuple of int
        Units of a row, groups of heads, rows and sequences.
    rotated_units : int
        Those of a row that are turned, before the others.
    heads_per_thread : int
    """

    blocks: tuple[int, int]
    extents: tuple[int, int, int, int]
    rotated_units: int
    heads_per_thread: int


class Rotary(ChunksKernel):
    """Rotary embedding.

    Attributes
    ----------
    arrays : dict of str to str
        What stands for pointers of the argument; the others have the names of arrays.
    inverts : bool
        Whether it turns the other way than a call says.
    """

    name = "attention_rotary"
    record = "RotaryParams"
    prologue = "  ptx::grid_begin();\n"
    arrays: Mapping[str, str] = MappingProxyType({})
    inverts = False

    def config(self, static: Static, arch: int) -> ConfigRotary:
        return ConfigRotary(**shared(static, arch), interleaved=static.rotary == "interleaved")

    def steps(self, config: ConfigRotary) -> tuple[Step, ...]:
        return tuple(Step(name, config.num_threads) for name in ("attention_rotary_positions", "attention_rotary"))

    def grid(self, config: ConfigRotary, problem: Problem, num_sms: int) -> RotaryGrid:
        assert isinstance(problem, RotaryProblem)
        chunk, dim = config.chunk, problem.rotary_dim
        rotated = dim // chunk if config.interleaved and chunk > 1 else dim // 2 // chunk
        units, heads = rotated + (problem.head_dim - dim) // chunk, problem.num_heads_q + problem.num_heads_k
        of_a_head = units * problem.seqlen_q * problem.batch
        resident = config.num_threads * config.blocks_per_sm * num_sms
        # Those of a thread share what it has read of cos and sin, as long as there are threads for the whole GPU.
        heads_per_thread = max(1, min(heads, of_a_head * heads // resident))
        extents = units, -(-heads // heads_per_thread), problem.seqlen_q, problem.batch
        (blocks,) = grid_of(config, extents, num_sms).blocks
        finding = -(-problem.seqlen_q // config.num_threads) if problem.varlen and blocks else 0
        return RotaryGrid((finding, blocks), extents, rotated, heads_per_thread)

    def scratch(self, config: ConfigRotary, problem: Problem, grid: RotaryGrid) -> Scratch:
        return Scratch({"row_positions": 0}, problem.seqlen_q) if grid.blocks[0] else NO_SCRATCH

    def values(self, config: ConfigRotary, problem: Problem, grid: RotaryGrid) -> dict[str, Any]:
        assert isinstance(problem, RotaryProblem)
        strides = problem.strides
        given = {name: strides.get(self.arrays.get(name, name)) for name in ("q", "k", "q_out", "k_out")}
        for name in "qk":
            given[f"{name}_out"] = given[f"{name}_out"] or contiguous(problem.heads_shape(name))
        positions = strides.get("positions", (0, 0))
        return {
            **{f"{name}_steps": _steps(each) for name, each in given.items()},
            "cos_strides": strides["cos"],
            "sin_strides": strides["sin"],
            "positions_steps": (0, 0, positions[-1], positions[0] if len(positions) == 2 else 0),
            **{f"{name}_stride": strides.get(name, (0,))[0] for name in ("offsets", "cu_seqlens")},
            "extents": grid.extents,
            "num_heads_q": problem.num_heads_q,
            "num_heads_k": problem.num_heads_k,
            "heads_per_thread": grid.heads_per_thread,
            "rotary_dim": problem.rotary_dim,
            "rotated_units": grid.rotated_units,
            "max_position": problem.specs["cos"].shape[0],
            "rows": problem.seqlen_q,
            "sequences": problem.sequences,
            "floats": problem.specs["cos"].dtype == "float32",
            "inverse": problem.inverse != self.inverts,
        }

    def argument(self, record: Record, config: ConfigRotary, problem: Problem, grid: RotaryGrid) -> Argument:
        content = record.pack(self.values(config, problem, grid))
        pointers = ((each.offset, self.arrays.get(each.name, each.name)) for each in record.pointers())
        return Argument(content, tuple(pointers))


class RotaryBackward(Rotary):
    """Its gradients, which are turned back."""

    arrays = MappingProxyType({"q": "dq_out", "k": "dk_out", "q_out": "dq", "k_out": "dk"})
    inverts = True


def _steps(strides: tuple[int, ...] | None) -> tuple[int, ...]:
    """Along columns, heads, rows and sequences."""
    return (0, 0, 0, 0) if strides is None else four(strides)[::-1]
