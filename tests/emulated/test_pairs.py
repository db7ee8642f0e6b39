"""Some rows of the cover of all pairs of features, in kernels that run on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pairs
import pytest
from sampling import paired

import cufa
import emulated
from cufa import masks
from cufa.testing import assert_close, assert_gradients_close, to_numpy

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())


def run(problem: pairs.Problem, arch: int) -> set[str]:
    """The kernels that a problem took, whose results are right."""
    with emulated.Gpu(arch=arch, num_sms=3, order=1) as gpu:
        found = [to_numpy(x) for x in problem.run(gpu)]
        entries = {launched.function.entry.removeprefix("attention_") for launched in gpu.launches}
    problem.check(found)
    return entries


@pytest.mark.parametrize(
    ("arch", "number", "kernel"),
    [
        (80, 7, "backward_sm80"),
        (80, 10, "forward_sm80"),
        (80, 8, "forward_split_sm80"),
        (90, 21, "backward_sm90"),
        (90, 33, "backward_split_keys_sm90"),
        (90, 2, "forward_cluster_sm90"),
        (90, 31, "forward_listed_sm90"),
    ],
)
def test_kernels_equal_the_reference(arch: int, number: int, kernel: str) -> None:
    assert kernel in run(pairs.Problem.of(pairs.ROWS[number], number), arch)


@pytest.mark.parametrize("pair", range(len(pairs.REFUSED)), ids=lambda number: pairs.name_of(pairs.REFUSED[number][0]))
def test_pairs_are_refused(pair: int) -> None:
    features, reason = pairs.REFUSED[pair]
    with emulated.Gpu() as gpu, pytest.raises(cufa.UnsupportedError, match=reason):
        pairs.Problem.of(pairs.PLAIN | features).run(gpu)


@pytest.mark.parametrize("mask", ["array", "function", "blocks"])
def test_dout_of_rows_that_see_no_key_counts_nowhere(mask: str) -> None:
    """Though it is NaN, and though the sink gives the row a lse."""
    row = pairs.PLAIN | {"mask": mask, "sinks": True, "dlse": True, "lengths": (20, 30), "bias": "xxxx"}
    run(pairs.Problem.of(row).spoiled(), 80)


@pytest.mark.parametrize(("mask", "arch"), paired(["array", "function", "blocks"], [90, 80]))
def test_all_terms_at_once(arch: int, mask: str) -> None:
    """Their data fit, with functions that read as much as functions may."""
    rng = np.random.default_rng(0)
    q, k, v, dout = rng.standard_normal((4, 1, 70, 2, 64)).astype(np.float16)
    tables = [rng.standard_normal((2, 3)).astype(np.float32) for _ in range(4)]
    allowed = [rng.random((2, 9)) < 0.2 for _ in range(5)]
    seen, blocks = rng.random((1, 2, 70, 70)) < 0.9, cufa.BlockMask.of(masks.chunked(50), 1, 1, 70, 70)
    arrays = {
        "alibi_slopes": np.array([0.1, 0.2], np.float32),
        "sinks": np.ones(2, np.float32),
        "bias": rng.standard_normal((1, 2, 70, 70)).astype(np.float16),
        "rel_bias": rng.standard_normal((2, 9)).astype(np.float32),
    }

    def score(s: Any, batch: Any, head: Any, query: Any, key: Any, *arrays: Any) -> Any:
        return s + sum(array[head, (key + number) % 3] for number, array in enumerate(arrays))

    def keeps(batch: Any, head: Any, query: Any, key: Any, *arrays: Any) -> Any:
        kept = key == query
        for array in arrays:
            kept = kept | array[head, key % 9]
        return kept

    def options(place: Any) -> dict[str, Any]:
        given: dict[str, Any] = {name: place(array) for name, array in arrays.items()}
        given |= {"softcap": 3.0, "dropout_p": 0.25, "seed": 5, "causal": True, "score": (score, *map(place, tables))}
        chosen = {"array": place(seen), "function": (keeps, *map(place, allowed)), "blocks": blocks._copied(place)}
        return given | {"mask": chosen[mask]}

    with emulated.Gpu(arch=arch) as gpu:
        given = options(gpu.array)
        placed = [gpu.array(x) for x in (q, k, v)]
        out, lse = cufa.attention(*placed, return_lse=True, **given)
        gradients = cufa.attention_backward(gpu.array(dout), *placed, out, lse, **given)
        out, lse, *gradients = (to_numpy(x) for x in (out, lse, *gradients))
    right = options(lambda array: array)
    assert_close(out, q, k, v, lse=lse, **right)
    assert_gradients_close(gradients, dout, q, k, v, **right)
