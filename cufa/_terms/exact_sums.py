"""Sums of gradients that are exact, and so the same bits in any order: ``cuda_src/attention/exact_sums.cuh``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._call.problem import Check

DIGITS = 8
"""Of a sum: ``ExactSums::digits``. Each is a word of 64 bits, in which 2^31 numbers add up."""

ADDED_SCORES = 256
"""Scores at least that a warp has added up before, where queries and keys share an element."""

MOST_SCORES = ADDED_SCORES << 31
"""That may share an element."""


def floats(numbers: int) -> int:
    """Scratch memory for so many sums, in float32 numbers."""
    return 2 * DIGITS * numbers


def check(call: Check, name: str, scores: int) -> None:
    """Refuse an array of which more scores share an element than a word has room for."""
    if call.limited and scores > MOST_SCORES:
        call.unsupported(
            f"up to {scores} scores share an element of {name}; sums that are the same bits in every run have at most "
            f"{MOST_SCORES}. Pass deterministic=False."
        )
