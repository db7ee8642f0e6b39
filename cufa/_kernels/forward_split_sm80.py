"""The forward for few query rows and many keys, as in decoding: keys are divided evenly over all thread blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .._call.problem import CHAIN_ROWS, Problem, Static
from ..errors import UnsupportedError
from .forward import key_blocks
from .kernel import (
    MAX_GRID,
    NO_SCRATCH,
    SHARED_MEMORY,
    SIZEOF,
    Config,
    Kernel,
    Scratch,
    Step,
    common,
    known_arch,
    round_up,
)
from .params import params_of

WARPS = 4
RESERVED_BYTES = 1 << 10
"""Shared memory that the GPU takes of an SM's for each thread block."""

BLOCK_BYTES = 8 << 10
"""K and V of a block of keys, for each warp that reads it: four such blocks, three of them on their way, and two thread
blocks, are what an SM needs in flight. Reckoned, not measured."""

MOST_STAGES = 6

MERGE_LANES = 8
"""Lanes of a warp that put a row of up to 128 columns together: 32, 16 or 8. With 8 a warp has four rows at a time,
which wait for memory together."""

WHOLE_BYTES = 512 << 10
"""K and V of a tile of queries that one thread block reads as fast as several that would have to put their parts
together, behind one more launch. Reckoned, not measured."""

LEAST_BYTES = 128 << 10
"""K and V that are worth a thread block of their own."""

ROWS_PER_WARP = 2
"""Rows that each warp of the last thread block to arrive puts together as fast as a launch for all rows would do.
Reckoned, not measured."""

CLEARING, MERGING = "attention_forward_split_clear", "attention_forward_split_merge"


@dataclass(frozen=True, kw_only=True)
class ConfigSplitSm80(Config):
    """What ``cuda_src/attention/forward_split_sm80.cuh`` needs besides.

    Attributes
    ----------
    kv_element : str
        Of k and v.
    column_warps : int
        Warps that share rows and split the columns of v.
    stages : int
        Blocks of keys in a ring.
    copy_bytes, q_copy_bytes : int
        Of keys and values, and of queries.
    resident : int
        Thread blocks that an SM holds at a time.
    merge_lanes : int
        Lanes of a warp that put a row together.
    looks_ahead : bool
        Whether where a block of keys lies is looked up before the copies of the one before it are waited for.
    """

    kv_element: str
    column_warps: int
    stages: int
    copy_bytes: int
    q_copy_bytes: int
    resident: int
    merge_lanes: int
    looks_ahead: bool = False

    @property
    def block_bytes(self) -> int:
        """Of k and v of a block of keys."""
        return self.block_n * (self.head_dim + self.head_dim_v) * SIZEOF[self.kv_element]

    def types(self) -> dict[str, str]:
        return super().types() | {"kv_element": self.kv_element}


class SplitGrid(NamedTuple):
    """Shape of a launch; see cuda_src/attention/split_schedule.cuh.

    Attributes
    ----------
    num_blocks : int
    m_blocks : int
        Tiles of queries per key head.
    item_blocks : int
        Blocks of keys that a tile sees at most.
    quotient, remainder : int
        Blocks of keys of a thread block, and how many thread blocks have one more.
    clearing : int
        Thread blocks that clear counters first, if thread blocks share tiles and the last to arrive finishes each.
    merging : int
        Thread blocks that put rows together, if thread blocks share tiles and a launch of its own finishes them.
    """

    num_blocks: int
    m_blocks: int
    item_blocks: int
    quotient: int
    remainder: int
    clearing: int = 0
    merging: int = 0

    @property
    def blocks(self) -> tuple[int, ...]:
        return (self.clearing, self.num_blocks, self.merging)


class ForwardSplitSm80(Kernel):
    """The forward of few query rows."""

    name = "attention_forward_split_sm80"
    record = "SplitParams"
    special = True
    few = "q has few rows, or tiles of them, and there are many keys, which all SMs share"

    def refusal(self, static: Static) -> str:
        if static.few_rows == 0:
            return "it is for few rows of q, those of all heads that share a key head together, and many keys"
        if static.few_rows > 32 and static.element == "f32" and max(static.head_dim, static.head_dim_v) > 128:
            return "so many rows of float32 leave no shared memory for keys"
        return ""

    def reason(self, static: Static, arch: int) -> str:
        if static.copy_bytes == 16:
            return self.few
        copied = f"q, k and v are copied {static.copy_bytes} bytes at a time"
        return f"{self.few}; {copied}; 16-byte aligned rows would be faster"

    def config(self, static: Static, arch: int) -> ConfigSplitSm80:
        return ConfigSplitSm80(**members(static, tile_of(static, known_arch(arch))))

    def steps(self, config: ConfigSplitSm80) -> tuple[Step, ...]:
        return (
            Step(CLEARING, config.num_threads),
            Step(self.name, config.num_threads, config.smem_bytes),
            Step(MERGING, config.num_threads),
        )

    def blocks_per_sm(self, config: ConfigSplitSm80) -> int:
        return config.resident

    def grid(self, config: ConfigSplitSm80, problem: Problem, num_sms: int) -> SplitGrid:
        ratio = problem.num_heads_q // max(1, problem.num_heads_k)
        m_blocks = -(-problem.seqlen_q * ratio // config.block_m)
        items = problem.batch * problem.num_heads_k * m_blocks
        if items > MAX_GRID:
            raise UnsupportedError(
                f"{problem.function}: {items} tiles of queries are more than one launch holds ({MAX_GRID}); split the "
                "batch."
            )
        shared = replace(config, pack=ratio)  # a tile's rows are those of heads that share it
        item_blocks = max(key_blocks(problem, shared, m_block) for m_block in range(m_blocks))
        return divided(config, items, problem.seqlen_q * ratio, max(1, item_blocks), num_sms)

    def values(self, config: ConfigSplitSm80, problem: Problem, grid: SplitGrid) -> dict[str, Any]:
        return {
            "params": params_of(problem, m_blocks=grid.m_blocks, heads_per_section=1),
            "num_blocks": grid.num_blocks,
            "num_heads_k": problem.num_heads_k,
            "item_blocks": grid.item_blocks,
            "quotient": grid.quotient,
            "remainder": grid.remainder,
        }

    def scratch(self, config: ConfigSplitSm80, problem: Problem, grid: SplitGrid) -> Scratch:
        partials = 2 * grid.num_blocks * partial_floats(config)
        if grid.merging:
            return Scratch({"partials": 0}, partials)
        if grid.clearing:
            return Scratch({"partials": 0, "counters": partials}, partials + grid.num_blocks)
        return NO_SCRATCH

    def asserts(self) -> str:
        return f"static_assert(tile::chain_rows == {CHAIN_ROWS});\n"


def members(static: Static, tile: Tile) -> dict[str, Any]:
    """The members of a Config of kernels with this main loop."""
    return {
        **common(static),
        "kv_element": kv_element(static),
        "tile_head_dim": round_up(static.head_dim, least_columns(static)),
        "tile_head_dim_v": tile_columns(static),
        "block_m": static.few_rows,
        "block_n": tile.block_n,
        "num_threads": 32 * tile.warps,
        "smem_bytes": tile.smem_bytes,
        "column_warps": column_warps(static),
        "stages": tile.stages,
        "copy_bytes": static.copy_bytes,
        "q_copy_bytes": static.copy_bytes,
        "resident": tile.resident,
        "merge_lanes": MERGE_LANES if static.head_dim_v <= 128 else 32,
    }


def partial_floats(config: Config) -> int:
    """``Partials::floats`` in cuda_src/attention/split_merge.cuh."""
    return config.block_m * (round_up(config.head_dim_v, 16) + 2)


def seen_blocks(problem: Problem, block_n: int) -> int:
    """Blocks of keys that some row sees, of all rows of a sequence: ``find_block_range``."""
    diagonal, left, right = problem.seqlen_k - problem.seqlen_q, problem.window_left, problem.window_right
    first = 0 if left is None else max(0, diagonal - left)
    end = problem.seqlen_k if right is None else min(problem.seqlen_k, problem.seqlen_k + right)
    return max(0, -(-end // block_n) - first // block_n)


def divided(config: ConfigSplitSm80, items: int, rows: int, item_blocks: int, num_sms: int) -> SplitGrid:
    """How many thread blocks there are, and what each has of so many items that count as alike.

    `rows` are those of a key head. A few keys are one thread block's only where a tile has all of these: several tiles
    wait for products, not for keys.
    """
    m_blocks, warps = -(-rows // config.block_m), config.num_threads // 32
    total, resident = items * item_blocks, config.resident * num_sms
    whole = SplitGrid(items, m_blocks, item_blocks, item_blocks, 0)
    if total == 0 or total > MAX_GRID or (m_blocks == 1 and item_blocks * config.block_bytes <= WHOLE_BYTES):
        return whole
    blocks = min(resident, max(items, total * config.block_bytes // LEAST_BYTES))
    quotient, remainder = divmod(total, blocks)
    if remainder == 0 and quotient % item_blocks == 0:
        return whole._replace(num_blocks=blocks, quotient=quotient)  # several whole items for each
    shared = SplitGrid(blocks, m_blocks, item_blocks, quotient, remainder)
    if rows > ROWS_PER_WARP * warps and items <= blocks:
        return shared._replace(merging=items * config.block_m // warps)
    return shared._replace(clearing=-(-blocks // config.num_threads))


def column_warps(static: Static) -> int:
    """Two where the output would leave few registers, as far as there are so many warps."""
    return 2 if static.head_dim_v > 128 and static.few_rows <= 32 else 1


def kv_element(static: Static) -> str:
    """Of k and v."""
    return static.kv_element or static.element


def least_columns(static: Static) -> int:
    """What columns in shared memory are a multiple of: a row has 64 bytes at least, lest a pass over rows copy more of
    them than lanes look up pages of."""
    return max(32, 64 // SIZEOF[kv_element(static)])


def tile_columns(static: Static) -> int:
    """Columns of v in shared memory: warps that share them have whole panels, of 128 bytes."""
    panels = 2 * 128 // SIZEOF[kv_element(static)]
    return round_up(static.head_dim_v, panels if column_warps(static) > 1 else least_columns(static))


class Tile(NamedTuple):
    """What `tile_of` says."""

    block_n: int
    warps: int
    stages: int
    resident: int
    smem_bytes: int


def tile_of(static: Static, arch: int, own_bytes: int = 0, most_resident: int = 2) -> Tile:
    """Blocks of keys, warps, and stages that fit.

    Two thread blocks per SM hide each other's beginnings and ends; where three stages of all warps' blocks do not fit
    twice, there is one, and where two do not fit once, there are fewer warps.

    `own_bytes` of shared memory a thread block has beside those of the tiles. An SM holds `most_resident` at most.
    """
    size, rows = SIZEOF[static.element], static.few_rows
    dim, dim_v = round_up(static.head_dim, least_columns(static)), tile_columns(static)
    key_bytes, group_warps = SIZEOF[kv_element(static)] * (dim + dim_v), rows // 16 * column_warps(static)
    most_keys = 16 if dim_v > 128 else 64 if static.element != "f32" else 32  # what registers the output leaves
    block_n = max(16, min(most_keys, 1 << (BLOCK_BYTES * group_warps // key_bytes).bit_length() - 1))
    most = SHARED_MEMORY[arch] - own_bytes

    def smem_bytes(groups: int, stages: int) -> int:
        group = max(stages * block_n * key_bytes, 4 * rows * (dim_v + 8))
        return size * rows * dim + groups * (group + 8 * rows)

    groups = WARPS // group_warps
    for resident, least in ((2, 3), (2, 2), (1, 3), (1, 2)):
        if resident > most_resident:
            continue
        budget = (SHARED_MEMORY[arch] + RESERVED_BYTES) // resident - RESERVED_BYTES - own_bytes
        for stages in range(MOST_STAGES, least - 1, -1):
            if smem_bytes(groups, stages) <= budget:
                return Tile(block_n, group_warps * groups, stages, resident, smem_bytes(groups, stages))
    while groups > 1 and smem_bytes(groups, 2) > most:
        groups //= 2
    return Tile(block_n, group_warps * groups, 2, 1, smem_bytes(groups, 2))
