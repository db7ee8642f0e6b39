"""The forward over caches of keys and values, for every GPU: one launch plans and appends, and one computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .._call.align import WORKSPACE_ALIGNMENT
from .._call.arrays import ALIGNMENT, contiguous
from .._call.kvcache import NO_SLOTS, KVCacheProblem, slots_of
from .._call.problem import ITEMSIZE, Problem, Static, widest_copy
from .._driver.launch import Argument
from ..errors import ArgumentError, UnsupportedError
from .forward_split_sm80 import (
    LEAST_BYTES,
    RESERVED_BYTES,
    ConfigSplitSm80,
    Tile,
    members,
    partial_floats,
    seen_blocks,
    tile_of,
)
from .kernel import (
    FASTEST,
    MAX_GRID,
    NO_SCRATCH,
    SHARED_MEMORY,
    Kernel,
    Scratch,
    Step,
    four,
    known_arch,
    reciprocal_of,
    round_up,
    small_reciprocal,
)
from .params import params_of
from .record import Record

PREPARE_THREADS = 256
WORK_BYTES = 128
MOST_SEQUENCES = 256
LEAST_SEQUENCES = 32
"""Sequences whose lengths each thread block of the main launch reads by itself, if it has shared memory for them, and
how many are worth it. Reckoned, not measured."""

PREPARING = "attention_cache_prepare"

BLOCK_WORDS, SEQUENCE_WORDS = 8, 4
"""Of what a plan says of a thread block, and of a sequence: ``PlanMemory`` in cuda_src/attention/cache_plan.cuh."""

SEQUENCE_BYTES = 4 * SEQUENCE_WORDS

ROTATED = "rotated_q"

NAMES = {"k": "k_cache", "v": "v_cache", "given_q": "q", "new_k": "k", "new_v": "v"}
"""The names of arrays by those of addresses in ``attention::CacheArgument``, where they differ."""


@dataclass(frozen=True, kw_only=True)
class ConfigCacheSm80(ConfigSplitSm80):
    """What ``cuda_src/attention/forward_cache_sm80.cuh`` needs besides.

    Attributes
    ----------
    page_rows : int
        Keys of a block that lie in one page side by side, from each multiple of so many on; 0 where caches are
        contiguous.
    slots : bool
        Whether rows of pages are found by their slots: ``CacheParams`` in cuda_src/attention/cache_params.cuh.
    own_sequences : int
        Sequences that a thread block has shared memory for, so that it need not wait for a plan; 0: it does always.
    work_bytes : int
        Shared memory behind that of the tiles, where a thread block has what it works on, and those sequences.
    prepare_threads : int
        Threads of a block of the launch that plans and appends.
    """

    page_rows: int
    slots: bool
    own_sequences: int = 0
    work_bytes: int = WORK_BYTES
    prepare_threads: int = PREPARE_THREADS

    def words(self) -> list[str]:
        own = [f"{self.kv_element} caches"] * (self.kv_element != self.element)
        return super().words() + own + ["paged"] * (self.page_rows > 0)


class CacheGrid(NamedTuple):
    """Shapes of the launches.

    Attributes
    ----------
    tokens : int
        Rows for which something is appended or rotated, a thread block each.
    num_blocks : int
        Thread blocks of the main launch.
    least_blocks : int
        Thread blocks that have something to do at least, as far as there is something.
    makes_plan : bool
        Whether the first launch does.
    divides : bool
        Whether of the plan that is the counters alone: thread blocks divide the work themselves.
    cluster : int
        Thread blocks of the main launch that are a cluster.
    """

    tokens: int
    num_blocks: int
    least_blocks: int
    makes_plan: bool
    divides: bool = False
    cluster: int = 1

    @property
    def blocks(self) -> tuple[int, ...]:
        return (self.tokens + self.makes_plan, self.num_blocks)


class ForwardCacheSm80(Kernel):
    """The forward over caches."""

    name = "attention_forward_cache_sm80"
    record = "CacheArgument"

    def reason(self, static: Static, arch: int) -> str:
        return FASTEST

    def config(self, static: Static, arch: int) -> ConfigCacheSm80:
        static = with_tile(static)
        tile = tile_of(static, known_arch(arch), WORK_BYTES + SEQUENCE_BYTES)
        own_sequences = 0 if static.varlen else sequences_beside(tile, known_arch(arch))
        work_bytes = WORK_BYTES + SEQUENCE_BYTES * (own_sequences + 1)
        return ConfigCacheSm80(**cache_members(static, tile), own_sequences=own_sequences, work_bytes=work_bytes)

    def steps(self, config: ConfigCacheSm80) -> tuple[Step, ...]:
        return (
            Step(PREPARING, config.prepare_threads),
            Step(self.name, config.num_threads, config.smem_bytes + config.work_bytes),
        )

    def blocks_per_sm(self, config: ConfigCacheSm80) -> int:
        return config.resident

    def grid(self, config: ConfigCacheSm80, problem: Problem, num_sms: int) -> CacheGrid:
        assert isinstance(problem, KVCacheProblem)
        ratio = problem.num_heads_q // max(1, problem.num_heads_k)
        rows = problem.seqlen_q * ratio
        tokens = tokens_of(problem)
        tiles = problem.batch * -(-rows // config.block_m)
        if problem.varlen:
            tiles = rows // config.block_m + problem.batch  # enough, without knowing one length
        items = tiles * problem.num_heads_k
        positions = items * (problem.num_splits or max(1, seen_blocks(problem, config.block_n)))
        most = max(tokens, rows, positions)
        if most >= MAX_GRID:
            raise UnsupportedError(
                f"{problem.function}: there are {most} rows, or blocks of keys, which are more than can be counted "
                f"({MAX_GRID}); split the batch."
            )
        least, blocks = items, positions
        if problem.num_splits == 0:
            blocks = min(config.resident * num_sms, max(items, positions // least_positions(config)))
            least = min(items, blocks)
        if problem.varlen and rows:  # someone clears rows that are no sequence's
            blocks = max(1, blocks)
        makes_plan = blocks > 0 and "plan" not in problem.specs
        divides = makes_plan and 0 < problem.batch <= config.own_sequences
        grid = CacheGrid(tokens, blocks, max(1, least), makes_plan, divides)
        check_plan(problem, grid)
        return grid

    def values(self, config: ConfigCacheSm80, problem: Problem, grid: CacheGrid) -> dict[str, Any]:
        assert isinstance(problem, KVCacheProblem)
        # Of an average sequence; whether there are several decides how long keys are kept in the L2.
        rows = problem.seqlen_q * (problem.num_heads_q // max(1, problem.num_heads_k))
        m_blocks = -(-rows // (config.block_m * (max(1, problem.batch) if problem.varlen else 1)))
        plan = {
            "makes_plan": grid.makes_plan,
            "divides": grid.divides,
            "plan_blocks": grid.num_blocks,
            "least_blocks": grid.least_blocks,
            "least_positions": least_positions(config) if problem.num_splits == 0 else 1,
        }
        return members_of(problem, plan, m_blocks=m_blocks)

    def argument(self, record: Record, config: Any, problem: Problem, grid: Any) -> Argument:
        assert isinstance(problem, KVCacheProblem)
        return renamed(super().argument(record, config, problem, grid), problem)

    def scratch(self, config: ConfigCacheSm80, problem: Problem, grid: CacheGrid) -> Scratch:
        assert isinstance(problem, KVCacheProblem)
        places = 1 if problem.num_splits else 2
        sizes = {"partials": places * grid.num_blocks * partial_floats(config)}
        if grid.makes_plan:
            sizes["plan"] = grid.num_blocks if grid.divides else plan_words(problem, grid)
        return scratch_of(sizes | rotated(problem))

    def asserts(self) -> str:
        return (
            f"static_assert(sizeof(attention::PlannedBlock) == {4 * BLOCK_WORDS});\n"
            f"static_assert(sizeof(attention::PlannedSequence) == {4 * SEQUENCE_WORDS});\n"
        )


class PlanGrid(CacheGrid):
    """The plan of such launches."""

    @property
    def blocks(self) -> tuple[int, ...]:
        return (int(self.makes_plan),)


class CachePlan(ForwardCacheSm80):
    """The plan alone, in memory of its own."""

    name = PREPARING

    def config(self, static: Static, arch: int) -> ConfigCacheSm80:
        """That of the calls' kernel, as far as a plan differs by it: by tiles, and by which keys are seen."""
        own = static._replace(terms=(), sinks=False, chains=False, page_rows=0, slots=False, rotary="", appends=False)
        return super().config(own._replace(copy_bytes=ALIGNMENT, q_copy_bytes=ALIGNMENT, store_bytes=ALIGNMENT), arch)

    def steps(self, config: ConfigCacheSm80) -> tuple[Step, ...]:
        return super().steps(config)[:1]

    def grid(self, config: ConfigCacheSm80, problem: Problem, num_sms: int) -> PlanGrid:
        grid = super().grid(config, problem, num_sms)
        return PlanGrid(0, grid.num_blocks, grid.least_blocks, grid.num_blocks > 0)

    def scratch(self, config: ConfigCacheSm80, problem: Problem, grid: CacheGrid) -> Scratch:
        return NO_SCRATCH


def with_tile(static: Static) -> Static:
    """The facts with rows of a tile that leaves shared memory for keys, as more of wide float32 do not."""
    wide = static.element == "f32" and max(static.head_dim, static.head_dim_v) > 128
    return static._replace(few_rows=min(static.few_rows, 32)) if wide else static


def cache_members(static: Static, tile: Tile) -> dict[str, Any]:
    """The members of a Config of kernels over caches with this main loop."""
    few_registers = static.few_rows > 32 and static.head_dim_v > 128
    return members(static, tile) | {
        "q_copy_bytes": ALIGNMENT if static.rotary else static.q_copy_bytes,
        "page_rows": min(static.page_rows, tile.block_n),  # of a block of keys, which is all that matters
        "slots": static.slots,
        "looks_ahead": static.page_rows > 0 and not few_registers,
    }


def tokens_of(problem: KVCacheProblem) -> int:
    """Rows for which something is appended or rotated."""
    if not problem.changes:
        return 0
    if problem.varlen:
        return problem.seqlen_q
    return problem.batch * max(problem.seqlen_new, problem.seqlen_q if problem.rotary_dim else 0)


def members_of(
    problem: KVCacheProblem, plan: dict[str, int], *, m_blocks: int, heads_per_section: int = 1
) -> dict[str, Any]:
    """The members of ``attention::CacheArgument`` that are no addresses; `plan` are those that say how it is made."""
    strides = problem.strides
    zeros = (0, 0, 0, 0)
    own = strides | {"k": strides["k_cache"], "v": strides["v_cache"], "q": query_strides(problem)}
    params = params_of(problem, m_blocks=m_blocks, heads_per_section=heads_per_section, strides=own)
    if problem.num_caches == 0:
        params["seqlen_k"] = 0  # there is no room for keys, whatever lengths say
    tables = {
        f"rotary_{name}_strides": (0, row, 0, column)
        for name in ("cos", "sin")
        for row, column in [strides.get(f"rotary_{name}", (0, 0))]
    }
    table_strides = strides.get("block_table", (0, 0))
    shift, reciprocal = reciprocal_of(problem.page_size) if problem.page_size else (0, 0)
    return {
        "params": params,
        "cache": {
            "given_q_strides": four(strides["q"]),
            "new_k_strides": four(strides.get("k", zeros)),
            "new_v_strides": four(strides.get("v", zeros)),
            **tables,
            "block_table_batch_stride": table_strides[0],
            "block_table_page_stride": table_strides[1],
            **{f"{name}_stride": strides.get(name, (0,))[0] for name in VECTORS},
            "num_heads_k": problem.num_heads_k,
            "heads_reciprocal": small_reciprocal(problem.num_heads_k),
            "num_caches": problem.num_caches,
            "page_size": problem.page_size,
            "page_shift": shift,
            "page_reciprocal": reciprocal,
            **(slots_of(problem.specs) if problem.page_size else NO_SLOTS)._asdict(),
            "appends": problem.changes,
            "seqlen_new": problem.seqlen_new,
            "max_position": problem.specs["rotary_cos"].shape[0] if problem.rotary_dim else 0,
            "rotary_dim": problem.rotary_dim,
            "rotary_interleaved": problem.rotary_interleaved,
            "rotary_moves": problem.rotary_advances,
            "rotary_floats": problem.rotary_dim > 0 and problem.specs["rotary_cos"].dtype == "float32",
            "wide_rows": problem.changes and has_wide_rows(problem),
            "num_splits": problem.num_splits,
            **{
                f"{name}_{axis}_stride": stride
                for name in ("k_descale", "v_descale")
                for axis, stride in zip(("batch", "head"), (0, 0, *strides.get(name, ()))[-2:], strict=True)
            },
            **plan,
        },
    }


def renamed(argument: Argument, problem: KVCacheProblem) -> Argument:
    """The same with the names of the arrays that addresses are those of."""
    names = NAMES | {"q": query_name(problem)}
    return argument._replace(pointers=tuple((offset, names.get(name, name)) for offset, name in argument.pointers))


def query_name(problem: KVCacheProblem) -> str:
    """Of what the main kernel reads as q."""
    return ROTATED if problem.rotary_dim else "q"


def query_strides(problem: KVCacheProblem) -> tuple[int, ...]:
    """Of what the main kernel reads as q."""
    if problem.rotary_dim:
        return contiguous((*problem.specs["q"].shape[:-1], row_elements(problem)))
    return problem.strides["q"]


def rotated(problem: KVCacheProblem) -> dict[str, int]:
    """The scratch memory that the rotated q takes, in float32 numbers."""
    if not problem.rotary_dim:
        return {}
    rows = math.prod(problem.specs["q"].shape[:-1])
    return {ROTATED: rows * row_elements(problem) * ITEMSIZE[problem.dtype] // 4}


def scratch_of(sizes: Mapping[str, int]) -> Scratch:
    """Scratch memory of parts that begin at aligned addresses."""
    parts, end = {}, 0
    for name, size in sizes.items():
        parts[name] = end
        end += round_up(size, WORKSPACE_ALIGNMENT)
    return Scratch(parts, end) if end else NO_SCRATCH


VECTORS = ("cache_seqlens", "cache_batch_idx", "cache_leftpad")


def sequences_beside(tile: Tile, arch: int) -> int:
    """Sequences that shared memory has room for without fewer stages, or thread blocks, than there are."""
    spare = (SHARED_MEMORY[arch] + RESERVED_BYTES) // tile.resident - RESERVED_BYTES - tile.smem_bytes - WORK_BYTES
    count = min(MOST_SEQUENCES, spare // SEQUENCE_BYTES - 1)
    return count if count >= LEAST_SEQUENCES else 0


def least_positions(config: ConfigCacheSm80) -> int:
    """Blocks of keys that are worth a thread block of their own."""
    return -(-LEAST_BYTES // config.block_bytes)


def plan_words(problem: Problem, grid: CacheGrid) -> int:
    """32-bit words of a plan: of thread blocks, of sequences and one behind the last, and counters; 0 if it is none."""
    return 0 if grid.num_blocks == 0 else (BLOCK_WORDS + 1) * grid.num_blocks + SEQUENCE_WORDS * (problem.batch + 1)


def check_plan(problem: Problem, grid: CacheGrid) -> None:
    """Refuse a plan that was made for another GPU, which has another number of thread blocks."""
    plan, words = problem.specs.get("plan"), plan_words(problem, grid)
    if plan is not None and plan.shape != (words,):
        raise ArgumentError(
            f"{problem.function}: plan has {plan.shape[0]} words, but {words} are expected here; make one with "
            "decode_plan on the device of the call."
        )


def row_elements(problem: Problem) -> int:
    """Elements of a row of the rotated q, which are whole chunks of 16 bytes."""
    return round_up(problem.head_dim, ALIGNMENT // ITEMSIZE[problem.dtype])


def has_wide_rows(problem: KVCacheProblem) -> bool:
    """Whether rows of all that is copied while appending begin at multiples of 16 bytes."""
    names = ("k", "v", "k_cache", "v_cache", *(("q",) if problem.rotary_dim else ()))
    specs = [problem.specs[name] for name in names]
    return all(widest_copy(spec, ITEMSIZE[spec.dtype]) == ALIGNMENT for spec in specs)
