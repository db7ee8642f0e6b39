"""Every pair of features on the CPU: each row of the cover is one problem, held to the reference."""

from __future__ import annotations

import itertools

import pairs
import pytest


def test_every_pair_is_covered_or_refused() -> None:
    covered = set().union(*map(pairs.pairs_of, pairs.ROWS))
    for one, other in itertools.combinations(pairs.FEATURES, 2):
        for values in itertools.product(pairs.FEATURES[one], pairs.FEATURES[other]):
            pair = {one: values[0], other: values[1]}
            assert (pairs.pairs_of(pair) <= covered) != pairs.refused(pair), pair
    assert len(pairs.ROWS) <= 40


@pytest.mark.parametrize("number", range(len(pairs.ROWS)), ids=lambda number: pairs.name_of(pairs.ROWS[number]))
def test_the_cpu_equals_the_reference(number: int) -> None:
    problem = pairs.Problem.of(pairs.ROWS[number], number)
    problem.check(problem.run())


@pytest.mark.parametrize("mask", ["array", "function", "blocks"])
def test_dout_of_rows_that_see_no_key_counts_nowhere(mask: str) -> None:
    """Though it is NaN, and though the sink gives the row a lse."""
    row = pairs.PLAIN | {"mask": mask, "sinks": True, "dlse": True, "heads": (4, 2), "dtype": "float32"}
    problem = pairs.Problem.of(row).spoiled()
    problem.check(problem.run())
