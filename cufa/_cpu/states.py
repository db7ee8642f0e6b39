"""States of attention on NumPy arrays: merged, and differentiated. They are validated by the caller.

float64 is computed in float64, every other dtype in float32, as much at a time as stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .._terms.term import Array

PIECE = 1 << 16
"""Elements of each state's out that are worked on at once."""


def merge(outs: Sequence[Array], lses: Sequence[Array], out: Array, lse: Array) -> None:
    """Write the state of all keys to `out` and `lse`; those of the others are (…, rows, heads, columns) and so on."""
    for rows, lse_rows in _pieces(out):
        parts = [each[lse_rows] for each in lses]
        weights, total = _weights(parts, lse[lse_rows].shape, _compute(out))
        merged = np.zeros(out[rows].shape, _compute(out))
        with np.errstate(over="ignore", invalid="ignore"):
            for each, part, weight in zip(outs, parts, weights, strict=True):
                merged += _along(weight) * _live(each[rows], part)
            out[rows] = merged
        lse[lse_rows] = total


def merge_backward(
    dout: Array,
    dlse: Array | None,
    outs: Sequence[Array],
    lses: Sequence[Array],
    douts: Sequence[Array],
    dlses: Sequence[Array],
) -> None:
    """Write the gradients by `outs` and `lses`."""
    for rows, lse_rows in _pieces(dout):
        parts = [each[lse_rows] for each in lses]
        gradient = dout[rows].astype(_compute(dout))
        weights, _ = _weights(parts, gradient.shape[1::-1], gradient.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            products = [gradient * _live(each[rows], part) for each, part in zip(outs, parts, strict=True)]
            deltas = [each.sum(axis=-1).swapaxes(-1, -2) for each in products]
            mean = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
            by_lse = 0 if dlse is None else dlse[lse_rows]
            for state, (part, weight, delta) in enumerate(zip(parts, weights, deltas, strict=True)):
                douts[state][rows] = np.where(_along(np.isneginf(part)), 0, _along(weight) * gradient)
                dlses[state][lse_rows] = np.where(np.isneginf(part), 0, weight * (delta - mean + by_lse))


def _pieces(out: Array) -> Iterator[tuple[Any, Any]]:
    """Where some rows are in out, and in lse."""
    *batch, length, heads, columns = out.shape
    step = max(1, PIECE // max(1, heads * columns))
    for entry in np.ndindex(*batch):
        for first in range(0, length, step):
            rows = slice(first, first + step)
            yield (*entry, rows), (*entry, slice(None), rows)


def _weights(lses: Sequence[Array], shape: tuple[int, ...], dtype: Any) -> tuple[list[Array], Array]:
    """What each state's out counts in the merged one, and the merged lse."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        largest = np.full(shape, -np.inf, dtype)
        for lse in lses:
            largest = np.fmax(largest, lse)
        total, counts = np.zeros(shape, dtype), []
        for lse in lses:
            # The largest counts 1 even if it is infinite, as is that of a sink which takes all probability.
            counts.append(np.where(lse == largest, 1, np.exp(lse.astype(dtype) - largest)))
            counts[-1][np.isneginf(lse)] = 0
            total += counts[-1]
        weights = [np.where(np.isneginf(lse), 0, count / total) for lse, count in zip(lses, counts, strict=True)]
        return weights, np.where(total == 0, -np.inf, largest + np.log(total))


def _along(x: Array) -> Array:
    """What belongs to (heads, rows), for (rows, heads, columns)."""
    return x.swapaxes(-1, -2)[..., None]


def _live(out: Array, lse: Array) -> Array:
    """out of a state, with zeros where it has no keys, whatever it holds there."""
    return np.where(_along(np.isneginf(lse)), 0, out.astype(_compute(out)))


def _compute(x: Array) -> type:
    return np.float64 if x.dtype == np.float64 else np.float32
