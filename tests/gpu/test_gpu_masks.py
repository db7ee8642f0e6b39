"""Kernels over the blocks of a `cufa.BlockMask`, on a GPU: beside the reference, and beside masks of their own."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from block_masks import WINDOWS, Kind, problems
from hypothesis import given, settings
from hypothesis import strategies as st

import cufa
from cufa import masks

pytestmark = pytest.mark.gpu

KINDS = (
    Kind("float16", 64, 64),
    Kind("bfloat16", 128, 128, {"causal": True}, terms=True),
    Kind("bfloat16", 192, 256, {"window_size": (90, 30)}),
    Kind("float32", 64, 96, terms=True),
)


@pytest.fixture(scope="module")
def cupy() -> Any:
    return pytest.importorskip("cupy")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(max_examples=10)
@given(data=st.data())
def test_calls_equal_the_reference(cupy: Any, kind: Kind, data: st.DataObject) -> None:
    problem = data.draw(problems(kind, (130, 300, 700, 20), (64, 128, (256, 128))))
    problem.check(problem.run(cupy.asarray, data.draw(st.booleans())))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", WINDOWS[1:], ids=str)
def test_listed_windows_are_windows(cupy: Any, dtype: str, head_dim: int, window: dict[str, Any]) -> None:
    """Of many blocks, most of them full or empty."""
    rng = cupy.random.default_rng(0)
    shapes = (2, 2000, 4, head_dim), (2, 2500, 2, head_dim), (2, 2500, 2, head_dim)
    q, k, v = (rng.standard_normal(shape, dtype=np.float32).astype(dtype) for shape in shapes)
    mask = masks.causal() if "causal" in window else masks.sliding_window(*window["window_size"])
    given = ({"mask": cufa.BlockMask.of(mask, 1, 1, 2000, 2500, like=q)}, window)
    (out, *gradients), (right, *others) = (both(q, k, v, options) for options in given)
    unit = 2.0**-9 if dtype == "float16" else 2.0**-18
    for found, expected in zip((out, *gradients), (right, *others), strict=True):
        difference = (found.astype(np.float32) - expected.astype(np.float32)).astype(np.float64)
        assert float(cupy.linalg.norm(difference)) <= unit * float(cupy.linalg.norm(expected.astype(np.float64)))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_documents_are_packed_sequences(cupy: Any, head_dim: int) -> None:
    """Of so many heads that not all run side by side; results by bounds, and again the same bits."""
    rng = cupy.random.default_rng(0)
    offsets = [0, 700, 705, 1900, 2048, 4000]
    q, k, v = (rng.standard_normal((1, 4000, 24, head_dim), dtype=np.float32).astype("float16") for _ in range(3))
    mask = cufa.BlockMask.of(masks.document(offsets=offsets) & masks.causal(), 1, 1, 4000, 4000, like=q)
    assert mask.bounded
    out, *gradients = both(q, k, v, {"mask": mask})
    assert bool((cufa.attention(q, k, v, mask=mask) == out).all())
    for first, end in itertools.pairwise(offsets):
        document = (array[:, first:end] for array in (q, k, v))
        for found, alone in zip((out, *gradients), both(*document, {"causal": True}), strict=True):
            expected = alone.astype(np.float64)
            difference = found[:, first:end].astype(np.float64) - expected
            assert float(cupy.linalg.norm(difference)) <= 2.0**-8 * float(cupy.linalg.norm(expected))


def both(q: Any, k: Any, v: Any, options: dict[str, Any]) -> tuple[Any, ...]:
    out, lse = cufa.attention(q, k, v, **options, return_lse=True)
    return out, *cufa.attention_backward(q, q, k, v, out, lse, **options)


def test_what_is_not_listed_is_not_read(cupy: Any) -> None:
    q, k, v = (cupy.ones((1, 512, 2, 64), np.float16) for _ in range(3))
    v[:, 128:256], k[:, 384:] = np.nan, np.nan
    mask = cufa.BlockMask.from_csr([0, 1, 2, 4, 4], [0, 2, 0, 2], 512, 512, like=q)
    out, *gradients = both(q, k, v, {"mask": mask})
    assert bool((out[:, :384] == 1).all()) and bool((out[:, 384:] == 0).all())
    assert all(bool(cupy.isfinite(gradient).all()) for gradient in gradients)


def test_arrays_of_another_framework_are_refused(cupy: Any) -> None:
    q = cupy.ones((1, 128, 1, 64), np.float16)
    with pytest.raises(TypeError, match="mask_key_entries is a numpy array but q is a cupy one"):
        cufa.attention(q, q, q, mask=cufa.BlockMask.of(masks.causal(), 1, 1, 128, 128))
