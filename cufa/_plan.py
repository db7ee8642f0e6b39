"""From a problem and a GPU to the kernel that serves it. Pure Python: it runs without a GPU."""

from __future__ import annotations

import heapq
import math
from functools import lru_cache
from typing import NamedTuple

from . import _configs, _configs_backward
from ._align import Copies
from ._configs import Config, ConfigAlign, ConfigSm90
from ._configs_backward import ConfigBackward
from ._problem import Problem, Static
from .errors import UnsupportedError

OLDEST_ARCH = 80
MAX_GRID = (1 << 31) - 1

PERSISTENT_ROUNDS = 8
"""Rounds of tiles from which on packed sequences, of which no lengths are known, are dealt out evenly enough."""

PASSED_SEQUENCES = 256
"""Packed sequences that a block without rounds may pass for each of its tiles, on the way to the first of them."""

SHARED_ROWS = 128
"""Rows of the small tiles that one tile of heads sharing it would replace, from which on it is the faster way."""

RESIDENT_THREADS = 1024
"""Threads an SM for which such blocks should be enough, before they are spared the way."""

PAIRED_TILES = 4
"""Tiles of an average packed sequence from which on pairs of them even out a causal mask; shorter ones waste halves."""

MAX_LISTED_BLOCKS = 160
"""Blocks whose tiles a launch can list: ``Deal`` in cuda_src/attention/tma_params.cuh."""

LISTED_GAIN = 0.98
"""What a list may at most leave of the time of the last rounds, to be worth it."""

TILE_OVERHEAD = 1.2
"""What a tile's beginning and end take, in blocks of keys."""

L2_SECTION = {"attention_forward_sm80": 16 << 20, "attention_forward_sm90": 2 << 20}
"""Bytes of K and V that heads running side by side may share. Less lets a short sequence's K and V arrive sooner; more
gives a causal mask better balance where blocks do not come in rounds. The L2 of every GPU from sm_80 holds as much."""

MAX_L2_SECTION = 16 << 20
NARROW_DIM, NARROW_HEADS = 64, 16
"""Dense heads this narrow, under a causal mask, go side by side in such numbers, as far as `MAX_L2_SECTION` bytes hold
their K and V: up to 1.5% faster (docs/forward_sm90.md, *Order of the tiles*)."""


ROW_THREADS = 256
"""Threads a block of kernels that go over rows, or offsets."""

SUMMED_ROWS = 16
"""Rows of an average packed sequence from which on sums of dq are worth their memory, a tile of them at least: the
kernel that needs none is slower."""

LONG_ROWS = 128
"""Rows of an average sequence that are no different from more."""


class Device(NamedTuple):
    """A GPU: compute capability (80 for 8.0) and number of SMs."""

    arch: int
    num_sms: int


class Plan(NamedTuple):
    """A kernel and how it is specialised.

    Attributes
    ----------
    kernel : str
        Name of the ``__global__`` function and of its header in ``cuda_src/attention/``.
    arch : int
        Compute capability it is compiled for.
    config : Config
    reason : str
        Why this kernel and not a faster one.
    """

    kernel: str
    arch: int
    config: Config
    reason: str

    @property
    def entries(self) -> tuple[str, ...]:
        """The ``__global__`` functions of the kernel's translation unit, in the order of their launches."""
        if not self.kernel.startswith("attention_backward_"):
            return (self.kernel,)
        before = ("attention_backward_offsets",) if self.config.varlen else ()
        after = "attention_backward_finish", "attention_backward_repair"
        return *before, "attention_backward_prepare", *self.main_entries, *after

    @property
    def main_entries(self) -> tuple[str, ...]:
        """Those of them that multiply."""
        if self.kernel == "attention_backward_split_sm90":
            return "attention_backward_split_keys_sm90", "attention_backward_split_queries_sm90"
        return (self.kernel,)

    @property
    def threads(self) -> tuple[int, ...]:
        """Threads a block of each."""
        main = tuple(self.config.num_threads for _ in self.main_entries)
        if not isinstance(self.config, ConfigBackward):
            return main
        finish = self.config.dq_threads * self.config.row_tiles
        if self.kernel == "attention_backward_split_sm90":
            finish = ROW_THREADS
        return *((ROW_THREADS,) if self.config.varlen else ()), ROW_THREADS, *main, finish, ROW_THREADS

    @property
    def smem_bytes(self) -> tuple[int, ...]:
        """Shared memory a block of each."""
        return tuple(self.config.smem_bytes if entry in self.main_entries else 0 for entry in self.entries)


class AlignPlan(NamedTuple):
    """The kernel that copies arrays whose rows are not aligned; members as of `Plan`."""

    kernel: str
    arch: int
    config: ConfigAlign

    @property
    def entries(self) -> tuple[str, ...]:
        return (self.kernel,)

    @property
    def threads(self) -> tuple[int, ...]:
        return (self.config.num_threads,)

    @property
    def smem_bytes(self) -> tuple[int, ...]:
        return (0,)


def make_align_plan(arch: int) -> AlignPlan:
    """The kernel that copies, for a GPU of compute capability `arch`."""
    blocks = (2048 if arch in LARGE_SMS else 1536) // ROW_THREADS
    return AlignPlan("attention_align", arch, ConfigAlign(num_threads=ROW_THREADS, blocks_per_sm=blocks))


LARGE_SMS = (80, 90, 100, 103)
"""Compute capabilities whose SMs hold 2048 threads; those of others hold 1536 at least."""


def make_align_blocks(plan: AlignPlan, copies: Copies, num_sms: int) -> int:
    """Thread blocks that copy: as many as run at a time, or as there are chunks for."""
    chunks = max(math.prod(axis.extent for axis in each.axes) for each in copies.made)
    return min(-(-chunks // plan.config.num_threads), plan.config.blocks_per_sm * num_sms)


class Grid(NamedTuple):
    """Shape of a launch; see cuda_src/attention/scheduler.cuh.

    Attributes
    ----------
    blocks : int
    m_blocks, m_units : int
        Tiles of queries a head, and units.
    heads_per_section : int
    round_units : int
        Units that are dealt to the blocks round by round.
    listed : tuple of tuple of int
        For each block, the tiles it takes after that; empty if there are none for any.
    units_per_block : int
        Units that a block of the kernel for sm_80 takes one after the other, if its sequences are `many`.
    """

    blocks: int
    m_blocks: int
    m_units: int
    heads_per_section: int
    round_units: int
    listed: tuple[tuple[int, ...], ...] = ()
    units_per_block: int = 1


@lru_cache(maxsize=1024)
def make_plan(static: Static, arch: int) -> Plan:
    """Choose kernel and Config.

    Raises
    ------
    UnsupportedError
        If the GPU is older than sm_80.
    """
    _check_arch(arch)
    shared = static.pack * static.short_rows >= SHARED_ROWS
    short = _configs.has_short_tile(static) and not shared
    if arch // 10 == 9 and static.element != "f32" and static.tma and not short:
        reason = "it is the fastest for this GPU"
        return Plan("attention_forward_sm90", arch, _configs.forward_sm90(static), reason)
    known = max(each for each in _configs.SHARED_MEMORY if each <= arch)
    return Plan("attention_forward_sm80", arch, _configs.forward_sm80(static, known), _reason(static, arch))


def _check_arch(arch: int) -> None:
    if arch < OLDEST_ARCH:
        raise UnsupportedError(
            f"cufa: a GPU of compute capability {arch // 10}.{arch % 10} is not supported; 8.0 (Ampere) or newer is. "
            "NumPy arrays are computed on the CPU."
        )


def make_grid(plan: Plan, problem: Problem, num_sms: int) -> Grid:
    """How many blocks `problem` takes, and in which order they go through it."""
    config = plan.config
    heads = problem.batch * problem.num_heads_q // config.pack
    if problem.varlen:
        # Always enough tiles, without knowing one length: see attention/packed.cuh.
        m_blocks = problem.seqlen_q // config.block_m + problem.batch
        num_tiles = m_blocks * problem.num_heads_q
    else:
        m_blocks = -(-problem.seqlen_q * config.pack // config.block_m)
        num_tiles = m_blocks * heads
    section = heads_per_section(plan, problem)
    if num_tiles > MAX_GRID:
        raise UnsupportedError(
            f"{problem.function}: {num_tiles} tiles of queries are more than one launch holds ({MAX_GRID}); split the "
            "batch."
        )
    # Someone has to clear the rows that are no sequence's, even where there is none.
    least = 1 if problem.varlen and problem.seqlen_q * problem.num_heads_q > 0 else 0
    if not isinstance(config, ConfigSm90):
        units_per_block = 1
        if problem.static and problem.static.many:
            resident = num_sms * RESIDENT_THREADS // config.num_threads
            units_per_block = max(1, min(problem.batch // PASSED_SEQUENCES, num_tiles // max(1, resident)))
        blocks = max(least, -(-num_tiles // units_per_block))
        return Grid(blocks, m_blocks, m_blocks, section, num_tiles, units_per_block=units_per_block)
    if problem.varlen and num_tiles < PERSISTENT_ROUNDS * num_sms:
        # A block a tile. The GPU hands them out in order, longest first.
        return Grid(max(least, num_tiles), m_blocks, m_blocks, section, num_tiles)
    # One block an SM works through its share, so that a tile's loads and the last one's output overlap with its
    # neighbours' products.
    blocks = min(num_tiles, num_sms)
    if problem.varlen:
        pairs = config.causal and problem.seqlen_q >= PAIRED_TILES * config.block_m * problem.batch
        m_units = problem.seqlen_q // (2 * config.block_m) + problem.batch if pairs else m_blocks
        return Grid(blocks, m_blocks, m_units, section, m_units * problem.num_heads_q)
    m_units = -(-m_blocks // 2) if config.causal else m_blocks  # a tile and its opposite cost the same
    units = m_units * heads
    grid = Grid(blocks, m_blocks, m_units, section, units)
    if not (config.causal or config.window) or blocks > MAX_LISTED_BLOCKS:
        return grid
    return _share_out(grid, plan, problem)


@lru_cache(maxsize=1024)
def make_backward_plan(static: Static, arch: int, deterministic: bool, average_rows: int = LONG_ROWS) -> Plan:
    """Choose kernel and Config of the gradients; `average_rows` is `average_rows` of the problem.

    Raises
    ------
    UnsupportedError
        If the GPU is older than sm_80.
    """
    _check_arch(arch)
    wide = max(static.head_dim, static.head_dim_v) > 128
    if arch // 10 == 9 and static.element != "f32" and static.tma and _configs.has_short_tile(static):
        # As the two passes are. Blocks take turns only where sequences have several, as packed ones may.
        deterministic |= wide and static.varlen
    elif arch // 10 == 9 and static.element != "f32" and static.tma:
        if wide:
            reason = "it is the fastest for this GPU and head_dims above 128"
        elif static.varlen and average_rows < SUMMED_ROWS:
            reason = "sequences are so short that sums of dq would take many times the memory of q"
        else:
            reason = "it is the fastest for this GPU"
            config: ConfigBackward = _configs_backward.backward_sm90(static, deterministic, average_rows)
            return Plan("attention_backward_sm90", arch, config, reason)
        return Plan("attention_backward_split_sm90", arch, _configs_backward.backward_split_sm90(static), reason)
    known = max(each for each in _configs.SHARED_MEMORY if each <= arch)
    config = _configs_backward.backward_sm80(static, known, deterministic, average_rows)
    return Plan("attention_backward_sm80", arch, config, _reason(static, arch))


def average_rows(problem: Problem) -> int:
    """Rows of q that an average packed sequence has, as far as they matter: 0, or a power of 2 up to `LONG_ROWS`."""
    if not problem.varlen or problem.seqlen_q >= LONG_ROWS * problem.batch:
        return LONG_ROWS
    return (1 << (problem.seqlen_q // problem.batch).bit_length()) >> 1


class BackwardGrid(NamedTuple):
    """Shapes of the launches of the gradients.

    Attributes
    ----------
    blocks : tuple of int
        Of each of `Plan.entries`.
    m_blocks, n_blocks : int
        Tiles of queries a query head, and blocks of keys a key head: of a sequence or, packed, of all of them.
    heads_per_section : int
        Key heads that are scheduled side by side.
    reversed : bool
        Whether blocks of keys come from last to first.
    workspace_rows : int
        Numbers that row_lse and row_delta have for a query head: of a sequence or, packed, of all of them.
    """

    blocks: tuple[int, ...]
    m_blocks: int
    n_blocks: int
    heads_per_section: int
    reversed: bool
    workspace_rows: int


def make_backward_grid(plan: Plan, problem: Problem, num_sms: int) -> BackwardGrid:
    """How many blocks the kernels of the gradients take."""
    config = plan.config
    assert isinstance(config, ConfigBackward)
    outer = 1 if problem.varlen else problem.batch

    def blocks_of(length: int, rows: int) -> int:
        if not problem.varlen:
            return -(-length // rows)
        # Always enough, without knowing one length: see attention/packed.cuh. Sequences without rows take none.
        return length // rows + min(problem.batch, length) if problem.batch else 0

    m_blocks, n_blocks = blocks_of(problem.seqlen_q, config.block_m), blocks_of(problem.seqlen_k, config.block_n)
    tiles, units = m_blocks * problem.num_heads_q * outer, n_blocks * problem.num_heads_k * outer
    largest = max(tiles, units)
    if largest > MAX_GRID:
        raise UnsupportedError(
            f"{problem.function}: {largest} tiles are more than one launch holds ({MAX_GRID}); split the batch."
        )
    sinks = problem.num_heads_q if config.sinks else 0
    least = 1 if problem.varlen else 0  # clears the rows that are no sequence's
    before = (2,) if problem.varlen else ()
    repair = min(max(tiles, units), num_sms) if tiles else 0
    workspace_rows = m_blocks * config.block_m
    if problem.varlen:
        workspace_rows = blocks_of(problem.seqlen_q, ALIGNED_ROWS) * ALIGNED_ROWS
    order = m_blocks, n_blocks, *_backward_order(plan, problem, num_sms), workspace_rows
    if plan.kernel == "attention_backward_split_sm90":
        queries = blocks_of(problem.seqlen_q, SPLIT_QUERIES) * problem.num_heads_q * outer
        return BackwardGrid((*before, tiles, units, queries, max(least, sinks), repair), *order)
    if plan.kernel == "attention_backward_sm80":
        groups = -(-tiles // config.row_tiles)
        finish = 0 if _writes_all_dq(config, problem) else groups
        return BackwardGrid((*before, groups, units, max(least, finish + sinks), repair), *order)
    # One block an SM takes one unit after the other, counted from where the first kernel sets 0.
    main = min(max(units, tiles if config.finishes else 0), num_sms)
    finish = sinks if config.finishes else max(least, tiles + sinks)
    return BackwardGrid((*before, max(tiles, min(main, 1)), main, finish, repair), *order)


def _writes_all_dq(config: ConfigBackward, problem: Problem) -> bool:
    """Whether the main kernel writes every row of dq: each tile of queries has one that sees a key."""
    if not config.writes_dq or problem.varlen or config.window or problem.seqlen_k == 0:
        return False
    return not config.causal or problem.seqlen_q - problem.seqlen_k < config.block_m


ALIGNED_ROWS = 4
"""Of which the numbers make 16 bytes: ``aligned_rows`` in attention/backward_work.cuh."""


SPLIT_QUERIES = 128
"""Queries a block of the pass over tiles of queries: ``QueriesConfig`` in attention/backward_split_queries_sm90.cuh."""


BACKWARD_SECTION = 24 << 20
"""Bytes of q, dout and sums of dq that heads running side by side may share."""


def _backward_order(plan: Plan, problem: Problem, num_sms: int) -> tuple[int, bool]:
    """Key heads side by side, and whether their blocks of keys come from last to first.

    As many heads as keep what their blocks read and add to in the L2, but blocks for all SMs. Under a causal mask the
    first keys come first, which take longest, so that blocks end evenly.
    """
    config = plan.config
    heads, seqlen_q, seqlen_k = problem.batch * problem.num_heads_k, problem.seqlen_q, problem.seqlen_k
    if problem.varlen:
        heads = problem.num_heads_k
        seqlen_q, seqlen_k = (seqlen // max(1, problem.batch) for seqlen in (seqlen_q, seqlen_k))
    assert isinstance(config, ConfigBackward)
    if config.deterministic:
        blocks, last_first = _turns(config, problem.varlen, seqlen_q, seqlen_k)
        sections = max(1, -(-heads // -(-num_sms // blocks)))
        return max(1, -(-heads // sections)), last_first
    ratio = problem.num_heads_q // max(1, problem.num_heads_k)
    size = _configs.SIZEOF[config.element]
    sums = 0 if plan.kernel == "attention_backward_split_sm90" else 4 * config.tile_head_dim
    head_bytes = max(1, ratio * seqlen_q * ((config.head_dim + config.head_dim_v) * size + sums))
    n_blocks = min(max(1, -(-seqlen_k // config.block_n)), CONTENDING_BLOCKS)
    sections = max(1, -(-heads // max(1, BACKWARD_SECTION // head_bytes, num_sms // n_blocks)))
    return max(1, -(-heads // sections)), False


CONTENDING_BLOCKS = 32
"""Blocks of keys of a head that may run at a time and add to the same tiles of dq as they come."""


def _turns(config: ConfigBackward, varlen: bool, seqlen_q: int, seqlen_k: int) -> tuple[int, bool]:
    """Where blocks add to dq in turn: how many of a head's should run at a time, and whether the last keys come first.

    A block waits where it begins, about a tile's time for each one before it, so they should be fewer than half of the
    head's tiles. They should not be few either: then more heads run side by side than the L2 holds. Under a mask a
    block of later keys begins with later queries, to which those before it come late. With the last keys first nobody
    waits for long; but under a causal mask they take shortest, and if a head has many, blocks end unevenly.

    The order decides how sums are rounded. Hence it does not depend on how many heads and sequences there are.
    """
    m_blocks, n_blocks = -(-seqlen_q // config.block_m), -(-seqlen_k // config.block_n)
    blocks = min(WAITING_BLOCKS, max(1, m_blocks // 2))
    if not config.causal:
        return blocks, config.window
    if varlen or n_blocks <= WAITING_BLOCKS:
        return blocks, True
    return min(blocks, 4), False


WAITING_BLOCKS = 16
"""Blocks of keys of a head that may run at a time if they wait for each other."""


def _share_out(grid: Grid, plan: Plan, problem: Problem) -> Grid:
    """List the tiles of the last round of units, and of what is left over, where that makes the blocks end earlier.

    The longest come first, each to the block that has least to do. Otherwise units stay whole: a list mixes more heads,
    whose K and V the L2 then has to hold.
    """
    config = plan.config
    heads = problem.batch * problem.num_heads_q // config.pack
    round_units = max(0, grid.round_units // max(1, grid.blocks) - 1) * grid.blocks
    tiles = []
    round_loads = [0.0] * grid.blocks
    for unit in range(round_units, grid.round_units):
        section, within = divmod(unit, grid.heads_per_section * grid.m_units)
        row = within // min(grid.heads_per_section, heads - section * grid.heads_per_section)
        last_row = grid.m_blocks - 1 - row
        for second, m_block in enumerate(
            (last_row, row) if grid.m_units < grid.m_blocks and row < last_row else (last_row,)
        ):
            cost = _key_blocks(problem, config, m_block) + TILE_OVERHEAD
            tiles.append((cost, 2 * (unit - round_units) + second))
            round_loads[unit % grid.blocks] += cost
    tiles.sort(key=lambda tile: -tile[0])
    loads = [(0.0, block) for block in range(grid.blocks)]
    listed: list[list[int]] = [[] for _ in range(grid.blocks)]
    for cost, entry in tiles:
        load, block = loads[0]
        listed[block].append(entry)
        heapq.heapreplace(loads, (load + cost, block))
    if max(loads, default=(0.0, 0))[0] > LISTED_GAIN * max(round_loads, default=0.0):
        return grid
    return grid._replace(round_units=round_units, listed=tuple(map(tuple, listed)))


def _key_blocks(problem: Problem, config: Config, m_block: int) -> int:
    """Blocks of keys that a tile of queries sees: block_range in cuda_src/attention/block_range.cuh."""
    diagonal = problem.seqlen_k - problem.seqlen_q
    first_row = m_block * config.block_m // config.pack
    last_row = min(((m_block + 1) * config.block_m - 1) // config.pack, problem.seqlen_q - 1)
    left, right = problem.window_left, problem.window_right
    first = 0 if left is None else max(0, first_row + diagonal - left)
    end = problem.seqlen_k if right is None else min(problem.seqlen_k, last_row + diagonal + right + 1)
    return max(0, -(-end // config.block_n) - first // config.block_n)


def heads_per_section(plan: Plan, problem: Problem) -> int:
    """Query heads scheduled side by side: as many as keep their K and V in the L2, in sections of equal size."""
    config = plan.config
    heads, seqlen_k = problem.batch * problem.num_heads_q // config.pack, problem.seqlen_k
    if problem.varlen:  # heads of one sequence, of average length
        heads, seqlen_k = problem.num_heads_q, seqlen_k // max(1, problem.batch)
    size = _configs.SIZEOF[config.element]
    head_bytes = max(1, seqlen_k * (config.head_dim + config.head_dim_v) * size)
    ratio = max(1, problem.num_heads_q // max(1, problem.num_heads_k) // config.pack)
    key_heads = -(-heads // ratio)
    section_bytes = L2_SECTION[plan.kernel]
    if config.causal and max(config.head_dim, config.head_dim_v) <= NARROW_DIM and not problem.varlen:
        section_bytes = max(section_bytes, min(NARROW_HEADS // ratio * head_bytes, MAX_L2_SECTION))
    sections = max(1, -(-key_heads // max(1, section_bytes // head_bytes)))
    return max(1, -(-key_heads // sections) * ratio)


def _reason(static: Static, arch: int) -> str:
    if _configs.has_short_tile(static):
        average = "on average " if static.varlen else ""
        return f"sequences are {average}so short that small tiles, many of which share an SM, are the fastest"
    if static.element == "f32":
        return "float32 takes three tf32 products for one; float16 and bfloat16 are at least seven times as fast"
    if static.copy_bytes < 16:
        faster = "16-byte aligned rows would be faster"
        if arch // 10 == 9:
            faster = "16-byte aligned rows would let the tensor memory accelerator copy, for a faster kernel"
        return f"q, k and v are copied {static.copy_bytes} bytes at a time; {faster}"
    if arch // 10 == 9:
        return "a stride of q, k or v is negative or reaches 2^40 bytes, beyond the tensor memory accelerator"
    if arch >= 90:
        return f"the kernel for sm_80 and newer serves sm_{arch}; there is none specific to it"
    return "it is the fastest for this GPU"
