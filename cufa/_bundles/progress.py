"""How far something is, for people: a bar on a terminal, and lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from .._compile import env as _env

T = TypeVar("T")
LINES = 10


def watched(done: Iterable[T], total: int, label: str, *, lines: bool = True) -> Iterator[T]:
    """Show on stderr how many of `total` are done, as they come: on a terminal with the time that is left.

    Elsewhere there is a line now and then, or nothing without `lines`; ``CUFA_PROGRESS`` decides where it is set.
    """
    wanted = _env.progress()
    if sys.stderr is None or wanted is False:
        yield from done
    elif sys.stderr.isatty():
        import click

        with click.progressbar(done, length=total, label=label, show_pos=True, show_eta=True, file=sys.stderr) as bar:
            yield from bar
    else:
        step = max(1, -(-total // LINES))
        for count, each in enumerate(done, 1):
            if (lines or wanted) and (count % step == 0 or count == total):
                print(f"{label}: {count} of {total}", file=sys.stderr, flush=True)
            yield each
