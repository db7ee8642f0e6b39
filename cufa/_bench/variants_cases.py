"""What is measured of biases, score functions, dropout and masks: cases, and which keys their queries see.

Nothing here needs a GPU, or knows who is measured.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DROPOUT_P = 0.1
SOFTCAP = 20.0
LIVE_BLOCKS = 0.1
"""The share of blocks that random block masks leave, beside those on the diagonal."""

KINDS = {
    "bias per head": "Biases",
    "bias per sequence": "Biases",
    "relative table": "Biases",
    "dropout": "Dropout",
    "ALiBi": "Score functions",
    "softcap": "Score functions",
    "documents": "Masks",
    "window": "Masks",
    "prefix": "Masks",
    "random blocks": "Masks",
}
"""The features, and the headings under which they are reported."""

LEARNED = ("bias per head", "relative table")
"""Features whose array has a gradient, which is part of the backward."""


class Case(NamedTuple):
    """A feature at a shape.

    `size` says of documents how many there are, of a window how many keys before its own a query sees, of a prefix how
    long it is, and of random blocks how many rows and columns they have.
    """

    feature: str
    batch: int
    seqlen: int
    num_heads: int
    head_dim: int
    causal: bool = False
    size: int = 0
    dtype: str = "bfloat16"

    @property
    def kind(self) -> str:
        """The heading under which it is reported."""
        return KINDS[self.feature]

    @property
    def masked(self) -> bool:
        """Whether a mask of its own says what a query sees."""
        return self.kind == "Masks"

    @property
    def plain_causal(self) -> bool:
        """Whether the plain call beside it is causal: the least that hides no more than the feature."""
        return self.causal or self.feature in ("documents", "window")

    @property
    def flop(self) -> float:
        """Floating-point operations of the forward, of pairs of a query and a key it sees."""
        return 4.0 * self.batch * self.num_heads * self.head_dim * live_pairs(self)

    @property
    def plain_flop(self) -> float:
        """The same of the plain call."""
        pairs = self.seqlen * (self.seqlen + 1) / 2 if self.plain_causal else self.seqlen**2
        return 4.0 * self.batch * self.num_heads * self.head_dim * pairs

    def __str__(self) -> str:
        words = {
            "bias per head": "bias (1, h, s, s) with its gradient",
            "bias per sequence": "bias (b, 1, s, s)",
            "relative table": "relative table with its gradient",
            "dropout": f"dropout {DROPOUT_P}",
            "documents": f"{self.size} documents",
            "window": f"window {self.size}",
            "prefix": f"prefix {self.size}",
            "random blocks": f"random blocks of {self.size}",
        }.get(self.feature, self.feature)
        causal = " causal" * self.causal
        return f"{words}{causal}, {self.batch} × {self.seqlen} × {self.num_heads} × {self.head_dim}"


def cases(*, quick: bool = False) -> list[Case]:
    """What is measured, in this order; if `quick`, each feature at one shape.

    The later shapes of a feature come behind all features, so that a run that is ended early has seen every one.
    """
    biased = [(8, 2048, 16, 128), (2, 8192, 16, 128), (8, 2048, 32, 64)]
    dropped = [(8, 2048, 16, 128), (2, 8192, 16, 128), (2, 8192, 32, 64)]
    first = [
        Case("bias per head", *biased[0]),
        Case("bias per sequence", *biased[0]),
        Case("relative table", 4, 4096, 16, 128),
        Case("dropout", *dropped[0]),
        Case("ALiBi", 4, 4096, 16, 128),
        Case("softcap", 4, 4096, 16, 128),
        Case("documents", 1, 32768, 16, 128, size=64),
        Case("window", 1, 32768, 16, 128, size=1024),
        Case("prefix", 2, 8192, 16, 128, size=2048),
        Case("random blocks", 2, 8192, 16, 128, size=128),
    ]
    if quick:
        return first
    later = [Case("bias per head", *shape) for shape in biased[1:]]
    later += [Case("bias per sequence", *shape) for shape in biased[1:]]
    later += [Case("dropout", *dropped[0], causal=True)]
    later += [Case("dropout", *shape, causal=causal) for shape in dropped[1:] for causal in (False, True)]
    return first + later


# --- masks --------------------------------------------------------------------------------------------


def lengths_of(case: Case) -> tuple[int, ...]:
    """Lengths of the documents, cut at random places."""
    cuts = np.random.default_rng(0).choice(case.seqlen - 1, case.size - 1, replace=False) + 1
    return tuple(np.diff([0, *sorted(cuts), case.seqlen]).tolist())


def pattern_of(case: Case) -> NDArray[np.int32] | None:
    """The array that a mask reads: every token's document, or which blocks are live, by block row and column."""
    if case.feature == "documents":
        return np.repeat(np.arange(case.size, dtype=np.int32), lengths_of(case))
    if case.feature == "random blocks":
        blocks = case.seqlen // case.size
        live = np.random.default_rng(0).random((blocks, blocks)) < LIVE_BLOCKS
        return (live | np.eye(blocks, dtype=bool)).astype(np.int32)
    return None


def sees(case: Case, pattern: Any, query: Any, key: Any) -> Any:
    """Whether queries see keys, of arrays of their numbers, by operators that every array library and tracer has."""
    if case.feature == "documents":
        return (pattern[query] == pattern[key]) & (query >= key)
    if case.feature == "window":
        return (query >= key) & (query - key <= case.size)
    if case.feature == "prefix":
        return (query >= key) | (key < case.size)
    if case.feature == "random blocks":
        return pattern[query // case.size, key // case.size] > 0
    assert case.causal, "every query sees every key"
    return query >= key


def live_pairs(case: Case) -> float:
    """Pairs of a query and a key it sees, of one sequence and head."""
    seqlen = case.seqlen
    if case.feature == "documents":
        return sum(length * (length + 1) / 2 for length in lengths_of(case))
    if case.feature == "window":
        reach = min(seqlen, case.size + 1)
        return reach * (reach + 1) / 2 + (seqlen - reach) * reach
    if case.feature == "prefix":
        later = seqlen - case.size
        return seqlen * case.size + later * (later + 1) / 2
    if case.feature == "random blocks":
        pattern = pattern_of(case)
        assert pattern is not None
        return float(pattern.sum()) * case.size**2
    return seqlen * (seqlen + 1) / 2 if case.causal else seqlen**2
