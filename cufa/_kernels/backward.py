"""What the kernels of the gradients share: their launches but for the main ones, grids, order and scratch memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .._call.align import WORKSPACE_ALIGNMENT
from .._call.arrays import contiguous
from .._call.problem import CHAIN_ROWS, Problem
from .._terms import exact_sums
from ..errors import UnsupportedError
from . import tensor_map
from .kernel import MAX_GRID, SIZEOF, Config, Kernel, Map, Scratch, Step, blocks_in, four
from .params import params_of
from .record import MAP_BYTES

ROW_THREADS = 256
"""Threads per block of kernels that go over rows, or offsets."""

ALIGNED_ROWS = 4
"""Rows whose numbers make 16 bytes: ``aligned_rows`` in attention/backward_work.cuh."""

PADDING_ROWS = 128
"""``padding_rows`` in attention/backward_work.cuh."""

SECTION = 24 << 20
"""Bytes of q, dout and sums of dq that heads running side by side may share."""

LATE_SECTION = 72 << 20
"""The same where blocks of keys come from a head's middle on, if more heads than fill the SMs do."""

WINDOW_SECTION = 28 << 20
"""Bytes of what a window shows of heads that run side by side, where it is counted in parts that blocks are done."""

CONTENDING_BLOCKS = 32
"""Blocks of keys of a head that may run at a time and add to the same tiles of dq as they come."""

TERM_BLOCKS = 8
"""Thread blocks per SM, at most, of what makes the gradients of score terms of their sums."""

WAITING_BLOCKS = 16
"""Blocks of keys of a head that may run at a time if they wait for each other."""

WARP = 32
"""Threads of a warp, and the most sequences whose heads are scheduled side by side."""

LAST_FIRST = 2**31 - 1
"""The middle of more blocks than any head has, so that all come from last to first."""


@dataclass(frozen=True, kw_only=True)
class ConfigBackward(Config):
    """What every kernel of the gradients needs besides.

    Attributes
    ----------
    copy_bytes, out_copy_bytes : int
        Widest copy that all rows allow that are not read through tensor maps, and those of out.
    deterministic : bool
        Whether blocks of keys add to dq in a fixed order.
    dq_threads : int
        Threads that hold a tile of dq.
    finishes : bool
        Whether thread blocks of the main kernel that find no more work write dq of heads that are done. Where packed
        sequences' tiles lie takes too long to find.
    part_blocks : int
        Blocks of keys that follow each other of which it is counted together how many are done; 0: all of a head. Tiles
        of dq are finished when their parts are done.
    sums_by_rows : bool
        Whether dq adds up in rows as those of q, and not in whole tiles, of which short sequences fill little.
    writes_dq : bool
        Whether the main kernel writes dq of sequences whose keys are all in one block, as dense ones then must be, and
        adds up nothing for them.
    row_tiles : int
        Tiles of rows that a thread block of the kernels before and after the main one takes.
    """

    copy_bytes: int
    out_copy_bytes: int
    deterministic: bool
    dq_threads: int
    finishes: bool = False
    part_blocks: int = 0
    sums_by_rows: bool = False
    writes_dq: bool = False
    row_tiles: int = 1


class BackwardGrid(NamedTuple):
    """Shapes of the launches of the gradients.

    Attributes
    ----------
    blocks : tuple of int
        Of each step.
    m_blocks, n_blocks : int
        Tiles of queries per query head, and blocks of keys per key head: of a sequence or, packed, of all of them.
    heads_per_section : int
        Key heads that are scheduled side by side. Of packed sequences, those of one, or all of several.
    middle : int
        The block of keys from which blocks go down to the first, and then, from this one on, up: ``ordered_block`` in
        attention/backward_work.cuh.
    workspace_rows : int
        Numbers that row_lse and row_delta have for a query head: of a sequence or, packed, of all of them.
    """

    blocks: tuple[int, ...]
    m_blocks: int
    n_blocks: int
    heads_per_section: int
    middle: int
    workspace_rows: int


class Counts(NamedTuple):
    """How often each kind of work occurs: what main kernels make their grids of.

    Attributes
    ----------
    tiles, units : int
        Tiles of queries, and blocks of keys, of all heads.
    sinks : int
        Heads whose sink has a gradient.
    least : int
        Blocks that the last kernels have at least: someone clears the rows that are no sequence's.
    """

    tiles: int
    units: int
    sinks: int
    least: int


class BackwardKernel(Kernel):
    """The gradients: main kernels, and before and after them kernels that go over rows.

    Attributes
    ----------
    main_entries : tuple of str
        The main kernels' functions.
    sums_dq : bool
        Whether dq adds up in memory.
    late_sums : bool
        Whether some blocks of keys may have sums of dq of their own: ``is_late`` in attention/backward_work.cuh.
    unit_counts : int
        Counts of units that kernels without sums of dq have: ``UnitCount`` in attention/backward_params.cuh.
    """

    record = "BackwardArgument"
    prologue = "  ptx::grid_begin();\n"
    main_entries: tuple[str, ...]
    sums_dq = True
    late_sums = False
    unit_counts = 0

    def finish_threads(self, config: Any) -> int:
        """Threads per block of what writes dq from its sums."""
        return int(config.dq_threads * config.row_tiles)

    def prepare_blocks(self, config: Any) -> int:
        """Blocks of the kernel before the main ones that an SM is to hold at least."""
        return 1

    def main_blocks(
        self, config: Any, problem: Problem, counts: Counts, num_sms: int
    ) -> tuple[int, tuple[int, ...], int]:
        """Blocks of the kernel before the main ones, of these, and of what comes after them."""
        raise NotImplementedError

    def shares_sections(self, config: Any, keys: int) -> bool:
        """Whether heads of several packed sequences, of so many keys on average, are scheduled side by side where
        blocks of keys wait for each other: ``packed_unit_beside`` in attention/backward_packed.cuh."""
        return False

    def main_steps(self, config: Any) -> tuple[Step, ...]:
        return tuple(Step(entry, config.num_threads, config.smem_bytes) for entry in self.main_entries)

    def steps(self, config: Any) -> tuple[Step, ...]:
        before = (Step("attention_backward_offsets", ROW_THREADS),) if config.varlen else ()
        return (
            *before,
            Step("attention_backward_prepare", ROW_THREADS, resident=self.prepare_blocks(config)),
            *self.main_steps(config),
            Step("attention_backward_finish", self.finish_threads(config)),
            *((Step("attention_backward_terms", ROW_THREADS),) if finishes_terms(config) else ()),
            Step("attention_backward_repair", ROW_THREADS),
        )

    def grid(self, config: Any, problem: Problem, num_sms: int) -> BackwardGrid:
        outer = 1 if problem.varlen else problem.batch
        m_blocks = blocks_in(problem.seqlen_q, config.block_m, problem)
        n_blocks = blocks_in(problem.seqlen_k, config.block_n, problem)
        tiles, units = m_blocks * problem.num_heads_q * outer, n_blocks * problem.num_heads_k * outer
        if max(tiles, units) > MAX_GRID:
            raise UnsupportedError(
                f"{problem.function}: {max(tiles, units)} tiles are more than one launch holds ({MAX_GRID}); split the "
                "batch."
            )
        sinks, least = problem.num_heads_q if config.sinks else 0, 1 if problem.varlen else 0
        counts = Counts(tiles, units, sinks, least)
        prepare, main, finish = self.main_blocks(config, problem, counts, num_sms)
        if any(term.has_gradient for term in config.variant):
            prepare = max(1, prepare)  # someone has to write the zeros from which they add up
        repair = min(max(tiles, units), num_sms) if tiles else 0
        workspace_rows = m_blocks * config.block_m
        if problem.varlen:
            workspace_rows = blocks_in(problem.seqlen_q, ALIGNED_ROWS, problem) * ALIGNED_ROWS
        terms: tuple[int, ...] = ()
        if finishes_terms(config):
            floats = sum(size for term in config.variant for size in term.scratch(problem).values())
            terms = (max(1, min(-(-floats // ROW_THREADS), num_sms * TERM_BLOCKS)),)
        blocks = (*((2,) if problem.varlen else ()), prepare, *main, finish, *terms, repair)
        return BackwardGrid(blocks, m_blocks, n_blocks, *self.order(config, problem, num_sms), workspace_rows)

    def order(self, config: Any, problem: Problem, num_sms: int) -> tuple[int, int]:
        """Key heads side by side, and from where their blocks of keys come.

        As many heads as keep what their blocks read and add to in the L2, but blocks for all SMs. Under a causal mask
        the first keys come first, which take longest, so that blocks end evenly.
        """
        if config.deterministic:
            return self.order_in_turn(config, problem, num_sms)
        heads, _, seqlen_k = heads_and_lengths(problem)
        row_bytes = self.row_bytes(config)
        n_blocks = min(max(1, -(-seqlen_k // config.block_n)), CONTENDING_BLOCKS)
        fitting = max(1, SECTION // self.head_bytes(config, problem), num_sms // n_blocks)
        left, right = problem.window_left, problem.window_right
        if config.part_blocks and left is not None and right is not None:
            # Of each head only the queries that see the keys of running blocks are wanted at a time, of one query head
            # after the other. With many heads side by side the short blocks of all, those of the last keys, come last.
            seen = left + right + 1
            if seen <= seqlen_k:
                running = num_sms * config.block_n * row_bytes
                fitting = max(fitting, (WINDOW_SECTION - running) // (seen * row_bytes))
        return evenly(heads, fitting), 0

    def order_in_turn(self, config: Any, problem: Problem, num_sms: int) -> tuple[int, int]:
        """The same where blocks add to dq in turn, of which few of a head should run at a time: see `turns`.

        So there are as many heads as that takes, but under a causal mask, where blocks do not wait for long anyway, no
        more than the L2 holds. Blocks from a head's middle on should begin as those before it end, which fill the SMs.
        """
        heads, seqlen_q, seqlen_k = heads_and_lengths(problem)
        late = self.late_sums and not problem.varlen and seqlen_q <= CHAIN_ROWS
        blocks, middle = turns(config, late, problem.varlen, seqlen_q, seqlen_k)
        beside = -(-num_sms // blocks)
        if self.late_sums and config.causal and middle > 0:
            head_bytes = self.head_bytes(config, problem)
            fitting = SECTION // head_bytes
            if middle != LAST_FIRST:
                fitting = max(LATE_SECTION // head_bytes, num_sms // middle)
            beside = max(1, min(beside, fitting))
        if problem.varlen and 0 < heads < beside and self.shares_sections(config, seqlen_k):
            heads *= problem.batch
            sections = max(1, -(-heads // beside))
            sequences = round(heads / sections / problem.num_heads_k)
            return max(1, min(sequences, WARP)) * problem.num_heads_k, middle
        return evenly(heads, beside), middle

    def row_bytes(self, config: Any) -> int:
        """Of a row of a query head that blocks of keys read or add to."""
        sums = 4 * config.tile_head_dim if self.sums_dq else 0
        return int((config.head_dim + config.head_dim_v) * SIZEOF[config.element] + sums)

    def head_bytes(self, config: Any, problem: Problem) -> int:
        """The same of all rows of a key head's queries."""
        _, seqlen_q, _ = heads_and_lengths(problem)
        ratio = problem.num_heads_q // max(1, problem.num_heads_k)
        return max(1, ratio * seqlen_q * self.row_bytes(config))

    def values(self, config: Any, problem: Problem, grid: BackwardGrid) -> dict[str, Any]:
        strides = problem.strides
        written = {f"d{name}": strides.get(f"d{name}") or contiguous(problem.shape(name)) for name in "qkv"}
        by_array = {"dout": strides["dout"], **written}
        params: dict[str, Any] = {f"{name}_strides": four(each) for name, each in by_array.items()}
        for name in ("lse", "dlse"):  # of batch, heads and rows
            *batch, head, row = strides.get(name, (0, 0, 0))
            params[f"{name}_strides"] = (batch[0] if batch else 0, row, head, 0)
        section, terms = grid.heads_per_section, config.variant
        forward = params_of(problem, m_blocks=grid.m_blocks, heads_per_section=section, terms=terms)
        params |= {"forward": forward, "workspace_rows": grid.workspace_rows, "n_blocks": grid.n_blocks}
        params |= {"middle": grid.middle, "late_sums": self.tiles_before_late(problem, grid)}
        return {"params": params, "scores": bytes(MAP_BYTES)}

    def maps(self, config: Any, problem: Problem) -> tuple[Map, ...]:
        return tensor_map.of_backward(problem, config)

    def tiles_before_late(self, problem: Problem, grid: BackwardGrid) -> int:
        """Tiles of dq, behind whose sums those of late blocks lie; 0 where no block is late."""
        return grid.m_blocks * problem.num_heads_q * problem.batch if 0 < grid.middle < grid.n_blocks else 0

    def chain_floats(self, config: Any, problem: Problem, grid: BackwardGrid) -> int:
        """What thread blocks take over of dk and dv, if their sums may be so long as to drift."""
        return 0

    def scratch(self, config: Any, problem: Problem, grid: BackwardGrid) -> Scratch:
        heads = problem.num_heads_q * (1 if problem.varlen else problem.batch)
        numbers, tiles = grid.workspace_rows * heads, grid.m_blocks * heads
        sums = 0, 0, self.unit_counts, 0
        if self.sums_dq:
            rows = problem.seqlen_q * heads if config.sums_by_rows else tiles * config.block_m
            if config.writes_dq and not problem.varlen:  # nothing is added up
                rows = 0
            done = (1 if problem.varlen else problem.batch) * problem.num_heads_k
            if config.part_blocks:
                done *= -(-grid.n_blocks // config.part_blocks)
            late = self.tiles_before_late(problem, grid)
            rows, tiles = rows + late * config.block_m, tiles + late
            sums = rows * config.tile_head_dim, tiles, 1, done
        dq_sum, dq_turns, next_unit, heads_done = sums
        packed = 2 * (problem.batch + 1) if problem.varlen else 0
        padding = PADDING_ROWS if problem.varlen else 0
        sizes = {  # (before, size): what an address has before it and from there on
            "row_lse": (padding, numbers),
            "row_delta": (padding, numbers),
            "dq_sum": (0, dq_sum),
            "turns": (0, dq_turns),
            "next_unit": (0, next_unit),
            "heads_done": (0, heads_done),
            "offsets_q": (0, packed),
            "offsets_k": (0, packed),
            "not_finite": (0, 1),
            "chains": (0, self.chain_floats(config, problem, grid)),
            **{name: (0, size) for term in config.variant for name, size in term.scratch(problem).items()},
        }
        parts, end = {}, 0
        for name, (before, size) in sizes.items():
            parts[name] = end + before
            end = -(-(end + before + size) // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT
        return Scratch(parts, end)

    def asserts(self) -> str:
        return (
            f"static_assert(tile::chain_rows == {CHAIN_ROWS});\n"
            f"static_assert(attention::ExactSums::digits == {exact_sums.DIGITS});\n"
        )


def finishes_terms(config: Config) -> bool:
    """Whether score terms have gradients that are made of sums behind the main kernels."""
    return any(term.finishes for term in config.variant)


def heads_and_lengths(problem: Problem) -> tuple[int, int, int]:
    """Key heads of all sequences, with the lengths of each; of packed ones those of one, with the average lengths."""
    if not problem.varlen:
        return problem.batch * problem.num_heads_k, problem.seqlen_q, problem.seqlen_k
    seqlen_q, seqlen_k = (seqlen // max(1, problem.batch) for seqlen in (problem.seqlen_q, problem.seqlen_k))
    return problem.num_heads_k, seqlen_q, seqlen_k


def evenly(heads: int, most: int) -> int:
    """Heads of a section, of at most so many, where sections are as even as they can be."""
    sections = max(1, -(-heads // most))
    return max(1, -(-heads // sections))


def turns(config: ConfigBackward, late: bool, varlen: bool, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """Where blocks add to dq in turn: how many of a head's should run at a time, and from where they come.

    A block waits where it begins, about a tile's time for each one before it, so they should be fewer than half of the
    head's tiles. They should not be few either: then more heads run side by side than the L2 holds. Under a mask a
    block of later keys begins with later queries, to which those before it come late. With the last keys first nobody
    waits for long; but under a causal mask they take shortest, and if a head has many, blocks end unevenly. With `late`
    they come from the middle down to the first, which the late ones then do not wait for, and these take shorter the
    later they come. A chain must not have a part of a head's tiles then: late blocks take its last tile first, and the
    block before would add to that in its next chain.

    The order decides how sums are rounded. Hence it does not depend on how many heads and sequences there are.
    """
    m_blocks, n_blocks = -(-seqlen_q // config.block_m), -(-seqlen_k // config.block_n)
    blocks = min(WAITING_BLOCKS, max(1, m_blocks // 2))
    if not config.causal:
        return blocks, LAST_FIRST if config.window else 0
    if varlen or n_blocks <= WAITING_BLOCKS:
        return blocks, LAST_FIRST
    return (blocks, n_blocks // 2) if late else (min(blocks, 4), 0)
