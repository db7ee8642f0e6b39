"""Dropout as the reference takes it: each entry draws its number for itself."""

from __future__ import annotations

from typing import Any, SupportsInt

import numpy as np

from .term import Array, At, Term


class Dropout(Term):
    """Probabilities are dropped with probability `dropout_p`, and the others are divided by that of being kept.

    Philox 4x32-7, with the key `seed`, gives four words of 32 bits for a counter of four. Of query i and key j of a
    head and a sequence the counter is ``(8 (i // 16) + i % 8, head, 4 (j // 16) + j % 8 // 2, sequence)``. Their number
    is 15 bits of word ``2 (j // 8 % 2) + i // 8 % 2``: from bit 0 on if j is even, else from bit 16 on. With n the
    integer nearest to ``2**15 dropout_p``, but at most ``2**15 - 1``, an entry is dropped if its number is less than n
    or, for n above ``2**14``, at least ``2**15 - n``.
    """

    def __init__(self, dropout_p: float, seed: SupportsInt) -> None:
        self.count = min(round(dropout_p * 2**15), 2**15 - 1)
        self.seed = int(seed) % 2**64

    def factor(self, at: At) -> Array:
        number = self._number(at)
        dropped = number < self.count if self.count <= 2**14 else number >= 2**15 - self.count
        return np.where(dropped, 0, 2**15 / (2**15 - self.count))

    def _number(self, at: At) -> Array:
        points = np.broadcast_arrays(at.query, at.key, at.head, at.batch)
        i, j, head, batch = (x.astype(np.uint64) for x in points)
        mask = np.uint64(0xFFFFFFFF)
        x: Any = 8 * (i // 16) + i % 8, head, 4 * (j // 16) + j % 8 // 2, batch
        low, high = self.seed % 2**32, self.seed >> 32
        for _ in range(7):
            a, b, c, d = x
            first, second = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
            x = (
                second >> 32 ^ b ^ np.uint64(low),
                second & mask,
                first >> 32 ^ d ^ np.uint64(high),
                first & mask,
            )
            low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
        word = np.choose((2 * (j // 8 % 2) + i // 8 % 2).astype(int), x)
        number: Array = (word >> 16 * (j % 2)) % 2**15
        return number
