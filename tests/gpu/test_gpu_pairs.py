"""Every pair of features on a GPU: each row of the cover is one problem, held to the reference."""

from __future__ import annotations

from typing import Any

import pairs
import pytest

import cufa

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cupy() -> Any:
    return pytest.importorskip("cupy")


@pytest.mark.parametrize("number", range(len(pairs.ROWS)), ids=lambda number: pairs.name_of(pairs.ROWS[number]))
def test_kernels_equal_the_reference(cupy: Any, number: int) -> None:
    problem = pairs.Problem.of(pairs.ROWS[number], number)
    problem.check(problem.run(cupy))


@pytest.mark.parametrize("pair", range(len(pairs.REFUSED)), ids=lambda number: pairs.name_of(pairs.REFUSED[number][0]))
def test_pairs_are_refused(cupy: Any, pair: int) -> None:
    features, reason = pairs.REFUSED[pair]
    with pytest.raises(cufa.UnsupportedError, match=reason):
        pairs.Problem.of(pairs.PLAIN | features).run(cupy)


@pytest.mark.parametrize("mask", ["array", "function", "blocks"])
@pytest.mark.parametrize("head_dims", [(64, 64), (192, 256)])
def test_dout_of_rows_that_see_no_key_counts_nowhere(cupy: Any, mask: str, head_dims: tuple[int, int]) -> None:
    row = pairs.PLAIN | {"mask": mask, "sinks": True, "dlse": True, "heads": (4, 2), "head_dims": head_dims}
    problem = pairs.Problem.of(row).spoiled()
    problem.check(problem.run(cupy))
