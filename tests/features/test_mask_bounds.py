"""What a `cufa.BlockMask` holds beside lists and bits: bounds, the tiles of entries, and which blocks take longest."""

from __future__ import annotations

import numpy as np
import pytest

import cufa
from cufa import masks

SIDE = 64


@pytest.mark.parametrize(
    ("mask", "seqlen", "bounded"),
    [
        (masks.causal(), 200, True),
        (masks.document(offsets=[0, 30, 100, 200]) & masks.causal(), 200, True),
        (masks.prefix_lm(70), 200, True),
        (masks.sliding_window(40, 10), 192, True),
        (masks.dilated(3), 128, False),
        (masks.causal() | masks.from_function(lambda batch, head, query, key: query == 3), 128, False),
        (masks.causal() & masks.from_function(lambda batch, head, query, key: query != 40), 128, False),
    ],
    ids=str,
)
def test_bounds_say_what_bits_do(mask: masks.Mask, seqlen: int, bounded: bool) -> None:
    made = cufa.BlockMask.of(mask, 1, 1, seqlen, seqlen, SIDE)
    assert made.bounded == bounded
    if not bounded:
        return
    tiles, bounds, seen = made.arrays[4][0, 0], made.arrays[-1], made.dense()[0, 0]
    for block in zip(*np.nonzero(tiles >= 0), strict=True):
        part = seen[tuple(slice(SIDE * place, SIDE * (place + 1)) for place in block)]
        first, end = bounds[tiles[block]] & 0xFFFF, bounds[tiles[block]] >> 16
        for lines, begin in ((part, 0), (part.T, SIDE)):
            for place, line in enumerate(lines):
                inside = np.arange(len(line))
                low, high = first[begin + place], end[begin + place]
                assert np.array_equal((inside >= low) & (inside < high), line)


def test_entries_have_the_tiles_of_the_table() -> None:
    made = cufa.BlockMask.of(masks.document(offsets=[0, 30, 100, 300]) & masks.causal(), 1, 1, 300, 300, SIDE)
    for entries, offsets, tiles, table in (
        (*made.arrays[:2], made.arrays[6], made.arrays[4][0, 0]),
        (*made.arrays[2:4], made.arrays[7], made.arrays[4][0, 0].T),
    ):
        for row, (begin, end) in enumerate(zip(offsets[0, 0], offsets[0, 0, 1:], strict=False)):
            for entry, tile in zip(entries[begin:end], tiles[begin:end], strict=True):
                assert tile == table[row, entry // 2] and (tile < 0) == (entry % 2 == 1)


@pytest.mark.parametrize("rows", [64, 128, 192])
def test_parts_are_those_of_which_something_is_seen(rows: int) -> None:
    mask = masks.document(offsets=[0, 30, 100, 256, 300, 420]) & masks.causal()
    made = cufa.BlockMask.of(mask, 1, 1, 420, 400, (rows, 128))
    seen, table = made.dense()[0, 0], made.arrays[4][0, 0]
    entries, offsets, tiles = made.arrays[10:13]
    for block, (begin, end) in enumerate(zip(offsets[0, 0], offsets[0, 0, 1:], strict=False)):
        parts = [seen[row : row + 64, 128 * block : 128 * (block + 1)] for row in range(0, 420, 64)]
        assert [entry // 2 for entry in entries[begin:end]] == [place for place, part in enumerate(parts) if part.any()]
        for entry, tile in zip(entries[begin:end], tiles[begin:end], strict=True):
            if tile < 0:
                assert tile == -1 and entry % 2 == 1 and parts[entry // 2].all()
            else:
                assert entry % 2 == 0 and tile == table[entry // 2 * 64 // rows, block]


def test_the_longest_come_first() -> None:
    made = cufa.BlockMask.from_coo([0, 1, 1, 1, 2, 2], [0, 0, 1, 2, 0, 1], 3 * SIDE, 3 * SIDE, SIDE)
    assert made.arrays[8].tolist() == [[[1, 2, 0]]] and made.arrays[9].tolist() == [[[0, 1, 2]]]
