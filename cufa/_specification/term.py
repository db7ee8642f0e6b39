"""What a further score term is to the reference: what it makes of scores, and where these are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[Any]


class At(NamedTuple):
    """Where scores are: arrays of integers that broadcast to (batch, num_heads_q, seqlen_q, seqlen_k)."""

    batch: Array
    head: Array
    query: Array
    key: Array
    distance: Array


class Term:
    """A further score term. By itself it changes nothing."""

    def score(self, s: Array, at: At) -> Array:
        """What becomes of scores."""
        return s

    def slope(self, s: Array, at: At) -> ArrayLike:
        """The derivative of that at the scores before."""
        return 1.0

    def keep(self, at: At) -> ArrayLike:
        """Which keys are kept, as far as the term has a say in it."""
        return True

    def factor(self, at: At) -> ArrayLike:
        """What probabilities are multiplied by behind their sum."""
        return 1.0

    def gradient(self, ds: Array, s: Array, at: At) -> tuple[Array, ...]:
        """The gradients by what it reads, from that by its result, which is 0 for removed keys; `s` are scores before.

        Packed sequences' are added up.
        """
        return ()

    def spread(self, alone: Array, shared: Sequence[Array], s: Array, at: At) -> tuple[tuple[Array, Array], ...]:
        """Mean squares of what errors of ds make of each gradient: of those alone, and of those that rows share.

        `alone` are mean squares of what single entries of ds err by. Each of `shared` is what entries err by if their
        row's random number is 1.
        """
        return ()
