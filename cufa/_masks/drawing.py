"""Masks as text and as images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIDE = 24
"""Queries and keys of a mask that is drawn without saying how many."""

LARGEST = 96
"""The most that a notebook shows by itself of a mask that has a number of them."""

CELL = 12
"""Pixels of an entry of an image."""

COLOR, GRID = "#3465a4", "#d3d7cf"


def text(seen: NDArray[np.bool_]) -> str:
    """Lines of ``#`` and ``.``, with the numbers of queries and keys."""
    queries, keys = seen.shape
    width, high = (max(1, len(str(count - 1))) for count in (keys, queries))
    head = f"{'j':>{high + 7}} " + " ".join(f"{key:>{width}}" for key in range(keys))
    rows = (" ".join(f"{'#' if each else '.':>{width}}" for each in row) for row in seen.tolist())
    lines = (f"   i {query:>{high}}   {row}" for query, row in enumerate(rows))
    return "\n".join(line.rstrip() for line in (head, *lines))


def blocks(kinds: NDArray[np.int8]) -> str:
    """Lines of ``.``, ``=`` and ``#`` for blocks that are empty, partial and full."""
    return "\n".join(" ".join(".=#"[kind] for kind in row) for row in kinds.tolist())


def svg(seen: NDArray[np.bool_]) -> str:
    """A square for each entry; those side by side that are seen are one rectangle."""
    queries, keys = seen.shape
    edges = np.diff(np.pad(seen.astype(np.int8), ((0, 0), (1, 1))))
    rectangles = []
    for query in range(queries):
        begins, ends = np.flatnonzero(edges[query] == 1), np.flatnonzero(edges[query] == -1)
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            rectangles.append(_rectangle(begin, query, end - begin))
    lines = [_line(x, 0, x, queries) for x in range(keys + 1)] + [_line(0, y, keys, y) for y in range(queries + 1)]
    size = f'width="{CELL * keys}" height="{CELL * queries}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join((*rectangles, *lines))}</svg>'


def _rectangle(x: int, y: int, width: int) -> str:
    corner = f'x="{CELL * x}" y="{CELL * y}"'
    return f'<rect {corner} width="{CELL * width}" height="{CELL}" fill="{COLOR}"/>'


def _line(x1: int, y1: int, x2: int, y2: int) -> str:
    ends = f'x1="{CELL * x1}" y1="{CELL * y1}" x2="{CELL * x2}" y2="{CELL * y2}"'
    return f'<line {ends} stroke="{GRID}"/>'
