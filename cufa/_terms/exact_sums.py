"""Sums of gradients that are exact, and so the same bits in any order: ``cuda_src/attention/exact_sums.cuh``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._call.problem import Check

DIGITS = 8
"""Of a sum: ``ExactSums::digits``. Each is a word of 64 bits."""

ROOM = 1 << 31
"""Numbers that add up in a word at most."""

SIDE = 16
"""Queries and keys at least whose scores a warp adds up before, where these share an element."""

ALONG = 64
"""Numbers that a warp adds to an element at most where a diagonal passes through a square of that side."""


def floats(numbers: int) -> int:
    """Scratch memory for so many sums, in float32 numbers."""
    return 2 * DIGITS * numbers


def check(call: Check, name: str, times: int, diagonals: bool = False) -> None:
    """Refuse an array if more numbers may add up in an element than a word has room for.

    All queries and keys share the element, in so many sequences and heads, which of packed ones are heads alone; or
    those do, with `diagonals`, that are as far apart.
    """
    if not call.limited:
        return
    ends = call.batch() if call.varlen else 0  # of packed sequences, where squares are not filled
    rows, columns = (-(-call.specs[each].shape[-3] // SIDE) + ends for each in "qk")
    numbers = times * (rows * columns + (ALONG * (rows + columns) if diagonals else 0))
    if numbers > ROOM:
        call.unsupported(
            f"up to {numbers} numbers may add up in an element of the gradient of {name}; sums that are the same bits "
            f"in every run have room for {ROOM}. Pass deterministic=False."
        )
