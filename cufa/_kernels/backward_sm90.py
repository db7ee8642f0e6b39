"""The gradients for Hopper in one pass over blocks of keys: wgmma, and sums of dq in memory."""

from __future__ import annotations

from dataclasses import dataclass

from .._call.problem import CHAIN_ROWS, Problem, Static
from . import tensor_map
from .backward import BackwardGrid, BackwardKernel, ConfigBackward, Counts
from .forward_sm90 import REGISTERS, STAGES
from .kernel import (
    SHARED_MEMORY,
    SIZEOF,
    WARPGROUP_ROWS,
    Map,
    Step,
    common,
    listed_blocks,
    mask_of,
    needs_maps,
    refuses_blocks,
    round_up,
)

SUMMED_ROWS = 16
"""Rows of an average packed sequence from which on sums of dq are worth their memory, a tile of them at least: the
kernel that needs none is slower."""

WIDEST = 128
"""The largest head dim whose dk and dv, with dq's products, fit the registers of a thread block."""

BIAS_QUERIES = 128
"""Queries of a tile of a bias's gradient."""

FEW_BLOCKS = 4
"""Blocks of keys up to which packed sequences under a causal mask lose by sharing sections."""

PART_BLOCKS = 16
"""Blocks of keys under a window of which it is counted together that they are done."""

LONGEST_SUM = 2 * CHAIN_ROWS
"""Rows over which the tensor cores add up by themselves: ``take_chain`` in attention/backward_work.cuh."""


TOLD_BYTES = 8
"""What consumers are told of a listed tile of queries: ``QueriesAhead::told_bytes`` in attention/block_ahead.cuh."""

SWIZZLED = 1 << 10
"""Bytes after which the swizzle of a tile in shared memory begins anew."""


@dataclass(frozen=True, kw_only=True)
class ConfigBackwardSm90(ConfigBackward):
    """What ``cuda_src/attention/backward_sm90.cuh`` and ``backward_split_sm90.cuh`` need besides.

    Of the threads a warpgroup loads and adds up dq; the others compute.

    Attributes
    ----------
    producer_registers, consumer_registers : int
        Registers per thread of the warpgroup that loads, and of the others.
    stages_terms : bool
        Whether what score terms read comes to shared memory with the tiles of queries.
    bias_chunks : int
        Chunks of `WARPGROUP_ROWS` keys in the tiles of the kernel that makes the gradient of a bias apart; 0: there is
        no such kernel. Boxes of the maps of k and v then have a chunk's rows.
    bias_rounds : int
        How many that share such a tile have their keys in shared memory at a time.
    bias_smem_bytes : int
        Shared memory of that kernel.
    """

    producer_registers: int
    consumer_registers: int
    stages_terms: bool = False
    bias_chunks: int = 0
    bias_rounds: int = 1
    bias_smem_bytes: int = 0

    @property
    def key_box(self) -> int:
        """Rows of the boxes of the maps of k and v."""
        return WARPGROUP_ROWS if self.bias_chunks else self.block_n

    @property
    def lists_parts(self) -> bool:
        """In one pass, unless blocks add to dq in turn, of which the lists of whole blocks tell."""
        blocks = listed_blocks(self.variant)
        return blocks is not None and blocks[0] > self.block_m and self.finishes and not self.deterministic

    def includes(self) -> list[str]:
        return super().includes() + (["attention/backward_bias_sm90.cuh"] if self.bias_chunks else [])


class BackwardSm90(BackwardKernel):
    """The gradients of 16-bit arrays on Hopper up to head_dim 128."""

    name = "attention_backward_sm90"
    main_entries = ("attention_backward_sm90",)
    target_suffix = "a"
    late_sums = True

    def runs_on(self, arch: int) -> bool:
        return arch // 10 == 9

    def refusal(self, static: Static) -> str:
        if why := needs_maps(static) or refuses_blocks(static, WARPGROUP_ROWS, 2 * WARPGROUP_ROWS):
            return why
        if max(static.head_dim, static.head_dim_v) > WIDEST:
            return f"one pass has no registers for head_dims above {WIDEST}"
        if static.varlen and static.average_rows < SUMMED_ROWS:
            return "sequences are so short that sums of dq would take many times the memory of q"
        return ""

    def config(self, static: Static, arch: int) -> ConfigBackwardSm90:
        listed = listed_blocks(static.terms) is not None
        if not listed:
            static = static._replace(terms=tuple(term.set_apart() for term in static.terms))
        block_m, block_n = tile(static)
        size = SIZEOF[static.element]
        tile_head_dim, tile_head_dim_v = round_up(static.head_dim, 64), round_up(static.head_dim_v, 64)
        tiles = size * ((block_n + STAGES * block_m) * (tile_head_dim + tile_head_dim_v) + STAGES * block_m * block_n)
        stages_terms = block_m == WARPGROUP_ROWS and stages(static)
        key_stages = 2 if doubles_keys(static, block_m) else 1
        tiles += size * (key_stages - 1) * block_n * tile_head_dim
        sums_stages = 1 if block_m == 128 or (stages_terms and tile_head_dim > 64) else 2
        rows = 4 * block_m * (sums_stages * tile_head_dim + 2 * STAGES)  # sums of dq, row_lse and row_delta
        chunks = bias_chunks(static)
        chunk_bytes = size * WARPGROUP_ROWS * (tile_head_dim + tile_head_dim_v)  # of keys, or of queries
        bias_rounds = 2 if (2 * STAGES + 2 * chunks) * chunk_bytes < SHARED_MEMORY[90] - SWIZZLED else 1
        bias_tiles = (2 * STAGES + bias_rounds * chunks) * chunk_bytes
        smem_bytes = tiles + rows + barriers_bytes(*[STAGES] * 4, key_stages, 1, 1, sums_stages, sums_stages)
        smem_bytes = round_up(smem_bytes, SWIZZLED if stages_terms else 16)
        if stages_terms:
            smem_bytes += STAGES * sum(term.staged_bytes(block_m, block_n) for term in static.terms)
        # To find work in lists takes registers, and consumers are told what these say.
        told = listed or mask_of(static.mask).lists
        smem_bytes += STAGES * TOLD_BYTES if told else 0
        registers = (40, 232) if static.deterministic or told else REGISTERS[block_n // WARPGROUP_ROWS]
        return ConfigBackwardSm90(
            **common(static),
            tile_head_dim=tile_head_dim,
            tile_head_dim_v=tile_head_dim_v,
            block_m=block_m,
            block_n=block_n,
            num_threads=128 * (1 + block_n // WARPGROUP_ROWS),
            smem_bytes=smem_bytes,
            copy_bytes=static.copy_bytes,
            out_copy_bytes=static.out_copy_bytes,
            deterministic=static.deterministic,
            dq_threads=2 * block_n,
            finishes=not static.varlen,
            part_blocks=PART_BLOCKS if windowed(static, block_m) else 0,
            producer_registers=registers[0],
            consumer_registers=registers[1],
            stages_terms=stages_terms,
            bias_chunks=chunks,
            bias_rounds=bias_rounds,
            bias_smem_bytes=bias_tiles + barriers_bytes(*[STAGES] * 2, *[bias_rounds] * 2 * chunks) if chunks else 0,
        )

    def main_steps(self, config: ConfigBackwardSm90) -> tuple[Step, ...]:
        apart = (Step("attention_backward_bias_sm90", config.num_threads, config.bias_smem_bytes),)
        main = Step(self.name, config.num_threads, config.smem_bytes, waits=True)
        return (main,) + (apart if config.bias_chunks else ())

    def prepare_blocks(self, config: ConfigBackwardSm90) -> int:
        # Its threads take 67 to 80 registers otherwise, and three blocks ask memory for less.
        return 4 if not config.variant and min(config.copy_bytes, config.out_copy_bytes) == 16 else 1

    def main_blocks(
        self, config: ConfigBackwardSm90, problem: Problem, counts: Counts, num_sms: int
    ) -> tuple[int, tuple[int, ...], int]:
        # One block per SM takes one unit after the other, counted from where the first kernel sets 0.
        main = min(max(counts.units, counts.tiles if config.finishes else 0), num_sms)
        finish = counts.sinks if config.finishes else max(counts.least, counts.tiles + counts.sinks)
        apart = (min(bias_tiles(config, problem), num_sms),) if config.bias_chunks else ()
        return max(counts.tiles, min(main, 1)), (main, *apart), finish

    def maps(self, config: ConfigBackwardSm90, problem: Problem) -> tuple[Map, ...]:
        arrays = [term.arrays[0] for term in config.variant if config.stages_terms and term.boxed]
        maps = tensor_map.of_backward(problem, config, config.key_box)
        return maps + tensor_map.of_scores(problem, config, arrays)

    def shares_sections(self, config: ConfigBackwardSm90, keys: int) -> bool:
        if max(config.head_dim, config.head_dim_v) > 64 or config.window:
            return False
        return not config.causal or keys > FEW_BLOCKS * config.block_n

    def chain_floats(self, config: ConfigBackwardSm90, problem: Problem, grid: BackwardGrid) -> int:
        steps = -(-problem.seqlen_q // config.block_m) * (problem.num_heads_q // max(1, problem.num_heads_k))
        if not config.chains or steps * config.block_m <= LONGEST_SUM:
            return 0
        columns = sum(round_up(dim, 16) for dim in (config.head_dim, config.head_dim_v))
        main = grid.blocks[[step.entry for step in self.steps(config)].index(self.name)]
        return main * config.block_n * columns


def stages(static: Static) -> bool:
    """Whether what score terms read is staged: boxes of one array, by which the kernel makes no gradient."""
    loading = [term for term in static.terms if term.loads]
    return len(loading) == 1 and loading[0].boxed and not loading[0].has_gradient


def bias_chunks(static: Static) -> int:
    """Chunks of keys in a tile of a bias's gradient: what registers hold beside scores and what terms load."""
    if not any(term.apart for term in static.terms):
        return 0
    return 3 if [term.loaded_bytes for term in static.terms] == [2] else 2


def bias_tiles(config: ConfigBackwardSm90, problem: Problem) -> int:
    """Tiles of a bias's gradient: ``BiasTile`` in attention/backward_bias_sm90.cuh."""
    batch, heads, queries, keys = problem.specs["bias"].shape
    return batch * heads * -(-queries // BIAS_QUERIES) * -(-keys // (config.bias_chunks * WARPGROUP_ROWS))


def tile(static: Static) -> tuple[int, int]:
    """The table of tiles: (block_m, block_n). What was tried is in docs/backward.md."""
    widest = max(static.head_dim, static.head_dim_v)
    # What is held of scores beside P takes registers.
    holds = any(term.bends or term.scales or term.has_gradient or term.apart for term in static.terms)
    wide = widest <= 64 and static.average_rows > 64 and not holds
    return 128 if wide and listed_blocks(static.terms) is None else 64, 128


def windowed(static: Static, block_m: int) -> bool:
    """Whether works are short because of a window: ``windowed`` in attention/backward_mainloop_sm90.cuh."""
    return block_m == 128 and static.mask == "window" and not static.varlen and not static.deterministic


def doubles_keys(static: Static, block_m: int) -> bool:
    """Whether keys have two stages: ``key_stages`` in attention/backward_mainloop_sm90.cuh."""
    causal = block_m == 128 and static.mask == "causal" and not static.varlen and not static.deterministic
    return causal or windowed(static, block_m)


def barriers_bytes(*rings: int) -> int:
    """Of rings of so many stages: ``Ring::bytes`` in tile/pipeline.cuh."""
    return 2 * 8 * sum(rings)
