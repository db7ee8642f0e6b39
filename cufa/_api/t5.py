"""T5's buckets of distances, which make a relative bias of a table with few rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._call import options as _options
from ..errors import ArgumentError


def t5_buckets(
    num_buckets: int = 32, max_distance: int = 128, reach: int | None = None, bidirectional: bool = True
) -> NDArray[np.intp]:
    """T5's bucket for each distance from -reach to reach, so that ``table[buckets].T`` is a `rel_bias`.

    Near distances have a bucket each, farther ones share buckets that grow like the distance, and all from
    `max_distance` on have the last one.

    Parameters
    ----------
    num_buckets : int
        Rows of the table, (num_buckets, num_heads). Even if `bidirectional`: half are for keys behind the query.
    max_distance : int
        From where on distances share a bucket.
    reach : int, optional
        `max_distance` if None; more give the same bias.
    bidirectional : bool
        Whether keys behind the query have buckets of their own, as in T5's encoder. Else they have that of distance 0,
        and are to be hidden by `causal`, as in its decoder.

    Returns
    -------
    int array, (2 · reach + 1,)

    Raises
    ------
    TypeError, ValueError
        If an argument is no integer, or too small for the others.

    See Also
    --------
    attention : Takes a `rel_bias`, and `attention_backward` gives its gradient, from which that of the table follows.

    Notes
    -----
    Raffel et al., *Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer*, 2020.

    Examples
    --------
    >>> import numpy as np
    >>> import cufa
    >>> buckets = cufa.t5_buckets(8, 16, 6)
    >>> buckets.tolist()  # of the distances -6 to 6: keys behind the query come first
    [7, 6, 6, 6, 6, 5, 0, 1, 2, 2, 2, 2, 3]
    >>> table = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    >>> table[buckets].T.shape
    (4, 13)
    """
    function = "t5_buckets"
    num_buckets, max_distance = (
        _options.integer(function, name, value)
        for name, value in (("num_buckets", num_buckets), ("max_distance", max_distance))
    )
    bidirectional = _options.flag(function, "bidirectional", bidirectional)
    reach = max_distance if reach is None else _options.integer(function, "reach", reach)
    own = num_buckets // 2 if bidirectional else num_buckets
    exact = own // 2
    if exact < 1 or (bidirectional and num_buckets % 2):
        least = "an even number, at least 4, if bidirectional" if bidirectional else "at least 2"
        raise ArgumentError(f"{function}: num_buckets is {num_buckets}; it must be {least}.")
    if max_distance <= exact:
        raise ArgumentError(f"{function}: max_distance is {max_distance}; it must be more than {exact}.")
    if reach < 0:
        raise ArgumentError(f"{function}: reach is {reach}; it must be at least 0.")
    distance = np.arange(-reach, reach + 1)
    far: NDArray[Any] = np.abs(distance) if bidirectional else np.maximum(distance, 0)
    # Distances at which a bucket begins exactly must not fall short of it by a rounding.
    steps = np.log(np.maximum(far, exact) / exact) / math.log(max_distance / exact) * (own - exact)
    bucket = np.where(far < exact, far, np.minimum(exact + np.floor(steps + 1e-9).astype(np.intp), own - 1))
    return bucket + own * (distance < 0) if bidirectional else bucket
