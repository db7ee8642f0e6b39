"""How much of what tests could try they do: a part that is the same in every run, or with CUFA_TEST_ALL=1 all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def everything() -> bool:
    """Whether all is asked for."""
    return os.environ.get("CUFA_TEST_ALL") == "1"


def sampled(items: Iterable[T], turn: int = 0, of: int = 2) -> list[T]:
    """Every `of`-th one, from number `turn` on, which counts beyond `of` as well; all of them if that is asked for.

    Of fewer than `of` it is one. Tests that take turns have all of them between them.
    """
    found = [*items]
    if everything() or not found:
        return found
    of = min(of, len(found))
    return found[turn % of :: of]


def paired(first: Iterable[T], second: Iterable[T]) -> list[tuple[T, T]]:
    """Pairs in which all items of both are: those whose numbers differ by an even one, or all pairs if asked for."""
    others = [*second]
    return [(one, other) for row, one in enumerate(first) for other in sampled(others, row)]


def examples(few: int, many: int) -> int:
    """Of Hypothesis: so many examples, or `many` if all is asked for."""
    return many if everything() else few
