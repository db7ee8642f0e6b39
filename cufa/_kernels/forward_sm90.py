"""The forward for Hopper: wgmma, tensor copies and warps with roles."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from .._call.problem import BASE_SHIFT, CHAIN_ROWS, Problem, Static
from . import tensor_map
from .forward import MAX_L2_SECTION, MAX_LISTED_BLOCKS, Grid, heads_per_section, least_blocks, share_out, tiles_of
from .kernel import (
    SHARED_MEMORY,
    SIZEOF,
    WARPGROUP_ROWS,
    Config,
    Kernel,
    Map,
    common,
    dividing,
    listed_blocks,
    needs_maps,
    refuses_blocks,
    round_up,
)
from .params import params_of
from .record import MAP_BYTES

PERSISTENT_ROUNDS = 8
"""Rounds of tiles from which on packed sequences, of which no lengths are known, are dealt out evenly enough."""

SHARED_ROWS = 128
"""Rows of the small tiles that one tile of heads sharing it would replace, from which on it is the faster way."""

PAIRED_TILES = 4
"""Tiles of an average packed sequence from which on pairs of them even out a causal mask; shorter ones waste halves."""

L2_SECTION = 2 << 20
"""Bytes of K and V that heads running side by side may share: few, so that a short sequence's arrive sooner."""

STAGES = 2
"""Blocks of K, and of V, in shared memory: more gain nothing, unless warpgroups have blocks of their own."""

OWN_STAGES, OWN_Q_STAGES = 4, 2
"""Blocks and tiles of Q where they have and rows are narrow: the last rows are blocks ahead of the first then."""

CONTROL_BYTES = 1 << 10
"""Shared memory for barriers and for what the kernel knows of its tiles and rows."""

REGISTERS = {2: (24, 240), 3: (32, 160), 4: (24, 112)}
"""(producer, consumer) registers per thread by number of consumers: with what a block starts with, all there are."""


@dataclass(frozen=True, kw_only=True)
class ConfigSm90(Config):
    """What ``cuda_src/attention/forward_sm90.cuh`` needs besides.

    Of its threads a warpgroup loads; for every `WARPGROUP_ROWS` of block_m there is one more.

    Attributes
    ----------
    stages : int
        Blocks of K, and of V, that are in shared memory at a time.
    producer_registers, consumer_registers : int
        Registers per thread of the warpgroup that loads, and of the others.
    early_steps : int
        Steps of P·V, of 16 keys, whose probabilities are computed while the products of the block before still run:
        what there are registers for.
    whole_turns : bool
        Whether a warpgroup's turn on the tensor cores ends with its products, and not already when they have begun.
    empty_rows : bool
        Whether rows of dense arrays may see no key.
    stages_terms : bool
        Whether a warp brings what score terms read to shared memory, and consumers do not load it ahead themselves.
    own_blocks : bool
        Whether each warpgroup goes over those blocks of keys alone that its own rows need.
    q_stages : int
        Tiles of Q that are in shared memory at a time.
    """

    stages: int
    producer_registers: int
    consumer_registers: int
    early_steps: int
    whole_turns: bool
    empty_rows: bool
    stages_terms: bool = False
    own_blocks: bool = False
    q_stages: int = 1


class ForwardSm90(Kernel):
    """The forward for 16-bit arrays on Hopper.

    Attributes
    ----------
    may_stage : bool
        Whether there is a warp that may bring what score terms read to shared memory.
    may_own : bool
        Whether warpgroups may have blocks of keys of their own.
    """

    name = "attention_forward_sm90"
    record = "TmaParams"
    target_suffix = "a"
    may_stage = True
    may_own = True

    def runs_on(self, arch: int) -> bool:
        return arch // 10 == 9

    def refusal(self, static: Static) -> str:
        shares_tiles = static.pack * static.short_rows >= SHARED_ROWS
        rows = 2 * WARPGROUP_ROWS // static.pack
        return needs_maps(static._replace(short_rows=0) if shares_tiles else static) or refuses_blocks(static, rows, 1)

    def tile(self, static: Static) -> tuple[int, int, int, bool]:
        """The row of the table of tiles."""
        return tile(static, self.stages_terms(static), self.own_blocks(static))

    def stages_terms(self, static: Static) -> bool:
        """Whether what score terms read is brought to shared memory: all of it, of rows that heads do not share."""
        loading = [term for term in static.terms if term.loads]
        return self.may_stage and static.pack == 1 and bool(loading) and all(term.stages for term in loading)

    def own_blocks(self, static: Static) -> bool:
        """Whether warpgroups have blocks of their own: under a window, where each needs not all that the tile does.

        At head_dim 128 tiles for which that leaves something out are slower: docs/forward_sm90.md, *Windows*.
        """
        widest = max(static.head_dim, static.head_dim_v)
        plain = not static.terms and static.pack == 1 and not static.chains and not static.short
        return self.may_own and static.mask == "window" and plain and not 64 < widest <= 192

    def config(self, static: Static, arch: int) -> ConfigSm90:
        block_m, block_n, early_steps, whole_turns = self.tile(static)
        stages_terms = self.stages_terms(static)
        blocks = listed_blocks(static.terms)
        if blocks:
            block_m, block_n = 2 * WARPGROUP_ROWS, dividing(block_n, blocks[1])
        size = SIZEOF[static.element]
        tile_head_dim, tile_head_dim_v = round_up(static.head_dim, 32), round_up(static.head_dim_v, 32)
        own_blocks, narrow = self.own_blocks(static), max(tile_head_dim, tile_head_dim_v) <= 64
        q_stages, stages = (OWN_Q_STAGES, OWN_STAGES) if own_blocks and narrow else (1, STAGES)
        tiles = q_stages * block_m * tile_head_dim + stages * block_n * (tile_head_dim + tile_head_dim_v)
        staged = STAGES * staged_bytes(static, block_m, block_n) if stages_terms else 0
        consumers = block_m // WARPGROUP_ROWS
        # Tiles this narrow leave registers to what finds them; to read lists, or what terms read, takes some. Of the
        # widest output none are left to tensor copies, which do with few.
        wide = max(tile_head_dim, tile_head_dim_v) > 192
        brings = stages_terms and not (wide and only_boxes(static))
        roomy = consumers == 2 and (narrow or blocks is not None or brings)
        producer_registers, consumer_registers = (40, 232) if roomy else REGISTERS[consumers]
        return ConfigSm90(
            **common(static),
            tile_head_dim=tile_head_dim,
            tile_head_dim_v=tile_head_dim_v,
            block_m=block_m,
            block_n=block_n,
            num_threads=128 * (1 + consumers),
            stages=stages,
            producer_registers=producer_registers,
            consumer_registers=consumer_registers,
            early_steps=early_steps,
            whole_turns=whole_turns,
            empty_rows=static.empty_rows,
            stages_terms=stages_terms,
            own_blocks=own_blocks,
            q_stages=q_stages,
            pack=static.pack,
            smem_bytes=size * tiles + CONTROL_BYTES + staged,
        )

    def grid(self, config: ConfigSm90, problem: Problem, num_sms: int) -> Grid:
        m_blocks, num_tiles = tiles_of(config, problem)
        section = heads_per_section(config, problem, L2_SECTION)
        left, right = problem.window_left, problem.window_right
        if not problem.varlen and left is not None and right is not None and left + right < problem.seqlen_k:
            # Of each head but the keys that some rows see are wanted at a time. With many heads side by side the
            # shorter tiles of all, those of the first rows, come last and even out the last round.
            section = heads_per_section(config, problem, MAX_L2_SECTION, left + right + 1)
        if problem.varlen and num_tiles < PERSISTENT_ROUNDS * num_sms:
            # A block per tile. The GPU hands them out in order, longest first.
            return Grid(max(least_blocks(problem), num_tiles), m_blocks, m_blocks, section, num_tiles)
        # One block per SM works through its share, so that a tile's loads and the last one's output overlap with its
        # neighbours' products.
        blocks = min(num_tiles, num_sms)
        if problem.varlen:
            pairs = config.causal and problem.seqlen_q >= PAIRED_TILES * config.block_m * problem.batch
            m_units = problem.seqlen_q // (2 * config.block_m) + problem.batch if pairs else m_blocks
            return Grid(blocks, m_blocks, m_units, section, m_units * problem.num_heads_q)
        m_units = -(-m_blocks // 2) if config.causal else m_blocks  # a tile and its opposite cost the same
        units = m_units * (problem.batch * problem.num_heads_q // config.pack)
        grid = Grid(blocks, m_blocks, m_units, section, units)
        if not (config.causal or config.window) or blocks > MAX_LISTED_BLOCKS:
            return grid
        return share_out(grid, config, problem)

    def values(self, config: ConfigSm90, problem: Problem, grid: Grid) -> dict[str, Any]:
        section = grid.heads_per_section
        params = params_of(problem, m_blocks=grid.m_blocks, heads_per_section=section, m_units=grid.m_units)
        return {"params": params, "deal": deal_of(grid), "scores": bytes(MAP_BYTES)}

    def maps(self, config: ConfigSm90, problem: Problem) -> tuple[Map, ...]:
        arrays = [term.arrays[0] for term in config.variant if config.stages_terms and term.boxed]
        return tensor_map.of_forward(problem, config) + tensor_map.of_scores(problem, config, arrays)

    def asserts(self) -> str:
        return (
            f"static_assert(tile::chain_rows == {CHAIN_ROWS});\n"
            f"static_assert(attention::Softmax<bf16, 1>::shift == {BASE_SHIFT});\n"
            f"static_assert(attention::Deal::max_blocks == {MAX_LISTED_BLOCKS});\n"
        )


def deal_of(grid: Grid) -> dict[str, Any]:
    """``attention::Deal`` of a launch."""
    tiles = [tile for listed in grid.listed for tile in listed]
    begin = [0, *itertools.accumulate(map(len, grid.listed))]
    begin += [len(tiles)] * (MAX_LISTED_BLOCKS + 1 - len(begin))
    tiles += [0] * (4 * MAX_LISTED_BLOCKS - len(tiles))
    return {"round_units": grid.round_units, "begin": begin, "tiles": tiles}


def only_boxes(static: Static) -> bool:
    """Whether all that score terms read comes by tensor copies, for which a warp needs few registers."""
    return all(term.boxed for term in static.terms if term.loads)


def staged_bytes(static: Static, block_m: int, block_n: int) -> int:
    """What score terms take of shared memory for a stage."""
    return sum(term.staged_bytes(block_m, block_n) for term in static.terms if term.loads)


def tile(static: Static, staged: bool = False, own: bool = False) -> tuple[int, int, int, bool]:
    """The table of tiles: (block_m, block_n, early_steps, whole_turns).

    Where scores, P and output share a thread's registers with Q and the stages of K and V in shared memory, block_n is
    what both leave. What was tried and is slower is in docs/forward_sm90.md, *Tiles*.
    """
    dim, dim_v = round_up(static.head_dim, 32), round_up(static.head_dim_v, 32)
    widest = max(dim, dim_v)
    plain = all(term.bounded for term in static.terms)  # what masks as ranges do takes no room
    window = static.mask == "window"
    boxed = staged and any(term.boxed for term in static.terms)
    drawn = any(term.drops for term in static.terms)
    quick = any(term.pairs for term in static.terms)
    loaded = 0 if staged else sum(term.loaded_bytes for term in static.terms)
    room = SHARED_MEMORY[90] - CONTROL_BYTES
    size = SIZEOF[static.element]

    def fits(block_m: int, block_n: int) -> bool:
        """In shared memory, stages included."""
        terms = staged_bytes(static, block_m, block_n) if staged else 0
        return size * block_m * dim + STAGES * (size * block_n * (dim + dim_v) + terms) <= room

    if widest <= 64:
        if own:  # three warpgroups, since what the others' rows alone need does not count
            return 192, 128, 0, True
        if window and plain:
            return 128, 128, 4, False
        narrow = window or loaded or (static.short and static.mask == "causal")
        if staged:  # with other terms 160 registers are too few
            narrow = narrow or len(static.terms) > 1 or not fits(192, 128)
        # What takes long between the products waits less in tiles that leave registers to it, and not for whole turns.
        slow = drawn or any(term.bends for term in static.terms)
        alone = len(static.terms) == 1 and not (narrow or static.varlen or static.full_tiles or static.pack > 1)
        if quick and alone:
            return 256, 64, 0, False
        if narrow or slow:
            return 128, 128, 0, not slow
        return 192, 128, 0, plain or staged or static.mask != "causal"
    ragged = widest > 96 and (dim, dim_v) != (static.head_dim, static.head_dim_v)  # which columns there are takes some
    registers = 196 if plain and not ragged else 184
    longest = 128 if window or static.short or boxed or ((quick or drawn) and widest <= 128) else 176
    if drawn and widest > 160:
        longest = 96
    if widest > 192:
        longest = 48 if staged and not only_boxes(static) else 64
    # A thread holds half a row's block of scores and P, and of what terms load ahead of them.
    step = 32 if boxed else 16  # boxes are swizzled
    block_n = min((registers - dim_v // 2) * 8 // (6 + loaded), longest) // step * step
    while not fits(128, block_n):
        block_n -= step
    early_steps = 4 if widest <= 128 else 1 if widest <= 160 else 2 if widest <= 192 else 0
    if ragged:
        early_steps = (early_steps + 1) // 2
    return 128, block_n, early_steps if plain or (staged and widest <= 128) else 0, False
