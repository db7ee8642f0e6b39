"""The score term of a `cufa.BlockMask`: it hides keys, and says over which blocks kernels go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .term import Array, Point, Term

if TYPE_CHECKING:
    from .._call.problem import Check, Problem

EMPTY, FULL = -2, -1
"""What the table of tiles holds for a block of which nothing, and one of which all is seen."""

LISTS = ("mask_key_entries", "mask_key_offsets", "mask_query_entries", "mask_query_offsets")
TABLE, BITS = "mask_tiles", "mask_bits"

BY_ENTRY, BOUNDS = ("mask_key_tiles", "mask_query_tiles"), "mask_bounds"
ORDERS = ("mask_query_order", "mask_key_order")
PARTS = ("mask_part_entries", "mask_part_offsets", "mask_part_tiles")


def next_power_of_2(number: int) -> int:
    """The least that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


class BlockMaskTerm(Term):
    """The term for blocks of so many queries and keys; `by_head` is whether key heads have lists of their own, and
    `bounded` whether of partial blocks bounds say what is seen, and not bits alone. `longest` are the keys of the
    blocks of the longest list, and the queries, where that is known.

    Its arrays are those of ``BlockMaskData`` in ``cuda_src/attention/block_mask.cuh``, where their meaning is. Its
    options are the lengths that the lists are made for.
    """

    name = "block_mask"
    header = "attention/block_mask.cuh"
    data = "BlockMaskData"
    arrays = (*LISTS, TABLE, BITS, *BY_ENTRY, *ORDERS, *PARTS, BOUNDS)
    option_names = ("mask_seqlen_q", "mask_seqlen_k")
    bends = False
    hides = True

    def __init__(
        self, rows: int, columns: int, by_head: bool, bounded: bool = False, longest: tuple[int, int] | None = None
    ) -> None:
        self.blocks: tuple[int, int] = rows, columns
        self.per_head = by_head
        self.bounded = bounded
        if longest is not None:  # powers of 2, so that masks of about the same lengths share what is prepared for calls
            self.spans = next_power_of_2(longest[0]), next_power_of_2(longest[1])
        self.type = f"attention::BlockMask<{rows}, {columns}, {str(by_head).lower()}, {str(bounded).lower()}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockMaskTerm) and (self.type, self.spans) == (other.type, other.spans)

    def __hash__(self) -> int:
        return hash(self.type)

    def plain(self, function: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(map(int, values))

    def check(self, call: Check) -> None:
        if call.varlen:
            call.unsupported("a BlockMask serves sequences of one length alone, and not packed ones.")
        made_for = tuple(call.options.own(name) for name in self.option_names)  # type: ignore[attr-defined]
        lengths = tuple(call.specs[name].shape[1] for name in "qk")
        if lengths != made_for:
            call.value_error(
                f"the mask is for {made_for[0]} queries and {made_for[1]} keys, but q has {lengths[0]} rows and k "
                f"{lengths[1]}; they must agree."
            )
        batch, heads_k = call.specs["q"].shape[0], call.specs["k"].shape[2]
        sequences, heads = call.specs[TABLE].shape[:2]
        if sequences not in (1, batch):
            call.value_error(f"the mask is for {sequences} sequences but q has {batch}; 1 or {batch} are expected.")
        if heads not in (1, heads_k):
            call.value_error(
                f"the mask is for {heads} key heads but k has {heads_k}; 1 or {heads_k} are expected. Query heads that "
                "share a key head share its blocks."
            )

    def values(self, problem: Problem) -> dict[str, Any]:
        sequences, heads, query_blocks, key_blocks = problem.specs[TABLE].shape
        return {
            "query_blocks": query_blocks,
            "key_blocks": key_blocks,
            "batch_lists": heads if sequences > 1 else 0,
            "head_lists": int(heads > 1),
            "qheads_per_khead": max(1, problem.num_heads_q // max(1, problem.num_heads_k)),
        }

    def options(self, problem: Problem) -> dict[str, Any]:
        return {"qheads_per_khead": max(1, problem.num_heads_q // max(1, problem.num_heads_k))}

    def keeps(self, at: Point, given: Mapping[str, Any]) -> Array | bool:
        table, bits = given[TABLE], given[BITS]
        rows, columns = self.blocks
        sequence = at.batch if table.shape[0] > 1 else np.zeros((1, 1, 1, 1), int)
        head = at.head // given["qheads_per_khead"] if table.shape[1] > 1 else np.zeros((1, 1, 1, 1), int)
        tile = table[sequence, head, at.query // rows, at.key // columns]
        words = bits[np.maximum(tile, 0), at.query % rows, at.key % columns // 32]
        seen: Array = np.where(tile < 0, tile == FULL, words >> at.key % 32 & 1 == 1)
        return seen
