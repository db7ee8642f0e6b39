"""What dropout drops, as an array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._call import options as _options
from .._terms.dropout import Rate, numbers, plain
from .._terms.term import Point
from ..errors import ArgumentError


def dropout_mask(shape: Sequence[int], dropout_p: float, seed: Any) -> NDArray[np.bool_]:
    """Which probabilities attention keeps, of those of all queries and keys, whether a mask hides keys or not.

    Computed on the CPU. On a GPU attention drops the same, whichever kernel serves the call.

    Parameters
    ----------
    shape : (int, int, int, int)
        batch, num_heads_q, seqlen_q and seqlen_k. Of packed sequences the first is how many there are, and the others
        may be those of the longest: what is kept does not depend on lengths.
    dropout_p : float
        As in `cufa.attention`.
    seed : int, array of no dimensions, or None
        As there; may be None if `dropout_p` is 0. The host waits for the value of an array.

    Returns
    -------
    kept : bool array of NumPy, (batch, num_heads_q, seqlen_q, seqlen_k)

    Raises
    ------
    TypeError
        If an argument has another type.
    ValueError
        If `shape` or `dropout_p` or `seed` is out of range.

    See Also
    --------
    attention : What the mask is of.

    Notes
    -----
    Numbers come from Philox 4x32-7 (Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*, 2011), whose key is
    the seed, and whose counters tell sequence, head, query and key. An entry has 15 bits, so `dropout_p` counts as the
    nearest multiple of 2^-15 that is less than 1, by which what is kept is scaled, too.

    Examples
    --------
    >>> import cufa
    >>> kept = cufa.dropout_mask((1, 8, 100, 200), 0.25, seed=7)
    >>> kept.shape, round(float(kept.mean()), 2)
    ((1, 8, 100, 200), 0.75)
    """
    function = "dropout_mask"
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence) or len(shape) != 4:
        raise TypeError(f"{function}: shape is {shape!r}; pass (batch, num_heads_q, seqlen_q, seqlen_k).")
    extents = tuple(_options.integer(function, "an extent of shape", extent) for extent in shape)
    if not all(0 <= extent <= _options.MAX_SEQLEN for extent in extents):
        raise ArgumentError(f"{function}: shape is {extents}; extents must be from 0 to {_options.MAX_SEQLEN}.")
    p, number = plain(function, dropout_p, seed)
    kept = np.ones(extents, np.bool_)
    if p == 0.0:
        return kept
    batch, heads, seqlen_q, seqlen_k = extents
    rate, query, key = Rate.of(p), np.arange(seqlen_q)[:, None], np.arange(seqlen_k)
    for b in range(batch):
        for h in range(heads):
            at = Point(_whole(b), _whole(h), query, key, seqlen_k - seqlen_q)
            kept[b, h] = rate.keeps(numbers(at, number))[0, 0]
    return kept


def _whole(number: int) -> NDArray[Any]:
    """A sequence or head of its own, in the axes of scores."""
    return np.full((1, 1, 1, 1), number)
