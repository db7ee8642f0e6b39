"""Philox 4x32-7 for arrays: see ``cuda_src/core/philox.cuh``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

ROUNDS = 7
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
INCREMENTS = 0x9E3779B9, 0xBB67AE85


def round_keys(key: int) -> list[int]:
    """The two words of each round's key, one round after the other; `key` is of 64 bits."""
    first, second = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    return [
        word + round * increment & 0xFFFFFFFF
        for round in range(ROUNDS)
        for word, increment in zip((first, second), INCREMENTS, strict=True)
    ]


_ONES = sum(1 << 64 * round for round in range(ROUNDS))
_LOW = 0xFFFFFFFF * _ONES
_STEPS = tuple(sum(round * increment << 64 * round for round in range(ROUNDS)) for increment in INCREMENTS)


def round_key_bytes(key: int) -> bytes:
    """`round_keys` as words of 32 bits in memory, in a microsecond: rounds are lanes of long integers."""
    first, second = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    low, high = first * _ONES + _STEPS[0] & _LOW, second * _ONES + _STEPS[1] & _LOW
    return (high << 32 | low).to_bytes(8 * ROUNDS, "little")


def philox(counters: tuple[Any, Any, Any, Any], key: int) -> tuple[Words, Words, Words, Words]:
    """The four words of each counter, whose own are arrays of integers that broadcast to each other."""
    x: Any = tuple(np.asarray(word).astype(np.uint32) for word in counters)
    keys = round_keys(key)
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        products = [
            np.multiply(word, np.uint64(by), dtype=np.uint64) for word, by in zip(x[::2], MULTIPLIERS, strict=True)
        ]
        (low_0, high_0), (low_1, high_1) = (
            (product.astype(np.uint32), (product >> np.uint64(32)).astype(np.uint32)) for product in products
        )
        x = high_1 ^ x[1] ^ np.uint32(first), low_1, high_0 ^ x[3] ^ np.uint32(second), low_0
    return tuple(np.broadcast_arrays(*x))  # type: ignore[return-value]
