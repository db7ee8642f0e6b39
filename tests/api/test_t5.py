"""T5's buckets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import cufa


def bucket_of(distance: int, num_buckets: int, max_distance: int, bidirectional: bool) -> int:
    """As the paper's code has it, in integers: the last bucket whose beginning is not beyond the distance."""
    first = 0
    if bidirectional:
        num_buckets //= 2
        first, distance = (num_buckets if distance < 0 else 0), abs(distance)
    distance, exact = max(distance, 0), num_buckets // 2
    if distance < exact:
        return first + distance
    # distance / exact >= (max_distance / exact) ** (step / steps), without a root
    steps = num_buckets - exact
    step = sum(distance**steps * exact**each >= max_distance**each * exact**steps for each in range(1, steps))
    return first + exact + step


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 16), (4, 5), (10, 1000), (64, 50)])
def test_buckets_equal_integers(num_buckets: int, max_distance: int, bidirectional: bool) -> None:
    buckets = cufa.t5_buckets(num_buckets, max_distance, 1500, bidirectional)
    expected = [bucket_of(d, num_buckets, max_distance, bidirectional) for d in range(-1500, 1501)]
    assert buckets.tolist() == expected and buckets.max() == num_buckets - 1


def test_the_reach_is_the_distance_from_which_on_all_share() -> None:
    assert cufa.t5_buckets(32, 128).shape == (257,)
    np.testing.assert_array_equal(cufa.t5_buckets(32, 128), cufa.t5_buckets(32, 128, 200)[72:-72])
    assert math.prod(cufa.t5_buckets(reach=0).shape) == 1


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"num_buckets": 7}, ValueError, "num_buckets is 7; it must be an even number, at least 4, if bidirectional."),
        ({"num_buckets": 1, "bidirectional": False}, ValueError, "num_buckets is 1; it must be at least 2."),
        ({"max_distance": 8}, ValueError, "max_distance is 8; it must be more than 8."),
        ({"reach": -1}, ValueError, "reach is -1; it must be at least 0."),
        ({"reach": 1.5}, TypeError, "reach is a float; pass an integer."),
        ({"bidirectional": 1}, TypeError, "bidirectional is a int; pass True or False."),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as refusal:
        cufa.t5_buckets(**given)
    assert str(refusal.value) == f"t5_buckets: {words}"
