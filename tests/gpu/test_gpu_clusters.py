"""On a GPU with thread block clusters: few query rows of few sequences, dense and in caches."""

from __future__ import annotations

from typing import Any

import pytest
from test_gpu import check, framework, same

import cufa
from cufa._call.problem import KEYS_PER_ROW
from cufa.testing import Case, KVCacheCase, assert_kvcache_close, to_numpy

pytestmark = pytest.mark.gpu

FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "terms": {"window_size": (700, 0), "softcap": 5.0, "alibi_ndim": 2, "sinks": True},
    "narrow": {"layouts": ("padded", "offset", "strided", "padded")},
}
ROWS = ((1, 8, 2), (1, 64, 8), (3, 5, 1), (8, 4, 1), (17, 3, 1))
"""Rows of q, and heads of q and of k, for tiles of 16, 32 and 64 rows."""


def case_of(features: str, batch: int, keys: int, rows: tuple[int, int, int], **changed: Any) -> Case:
    facts: dict[str, Any] = {"dtype": "bfloat16", "head_dim": 128, "head_dim_v": 128, "return_lse": True}
    facts |= dict(zip(("seqlen_q", "num_heads_q", "num_heads_k"), rows, strict=True))
    return Case(batch=batch, seqlen_k=keys, **facts | FEATURES[features] | changed)


def cupy() -> Any:
    xp = framework("cupy")
    if int(xp.cuda.Device().compute_capability) < 90:
        pytest.skip("clusters exist from compute capability 9.0 on")
    return xp


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_few_rows_equal_reference(rows: tuple[int, int, int], features: str) -> None:
    xp = cupy()
    for batch, keys in ((1, 300), (1, 1024), (1, 5001), (2, 2047), (5, 1500), (16, 700)):
        case = case_of(features, batch, keys, rows)
        if keys >= KEYS_PER_ROW * rows[0] * rows[1] // rows[2]:
            assert "cluster" in cufa.explain(**case.arrays(xp), **case.options).kernel
        check(case, xp)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("head_dims", [(64, 64), (256, 256), (40, 200)], ids=str)
def test_other_tiles_equal_reference(head_dims: tuple[int, int], dtype: str) -> None:
    xp = cupy()
    for keys in (300, 4100):
        shape = {"head_dim": head_dims[0], "head_dim_v": head_dims[1], "dtype": dtype}
        check(case_of("causal", 2, keys, ROWS[0], **shape), xp)


def test_rows_that_are_not_finite_at_first() -> None:
    xp = cupy()
    for values in ("huge", "huge scores", "large rows"):
        check(case_of("full", 1, 2000, ROWS[0], values=values), xp)


def test_results_are_bitwise_repeatable() -> None:
    xp = cupy()
    case = case_of("full", 2, 8192, ROWS[1])
    arrays = case.arrays(xp)
    first = cufa.attention(**arrays, **case.options, return_lse=True)
    for _ in range(50):
        assert all(map(same, first, cufa.attention(**arrays, **case.options, return_lse=True)))


@pytest.mark.parametrize("appended", [0, 1, 3])
@pytest.mark.parametrize("page_size", [0, 5, 64])
def test_caches_equal_reference(page_size: int, appended: int) -> None:
    xp = cupy()
    case = KVCacheCase(
        batch=3,
        seqlen_q=max(1, appended),
        lengths=(1900, 0, 777),
        capacity=2048,
        seqlen_new=appended,
        page_size=page_size,
        num_heads_q=16,
        num_heads_k=4,
        head_dim=128,
        head_dim_v=128,
        rotary_dim=64 if appended else 0,
        dtype="bfloat16",
        causal=True,
        return_lse=True,
    )
    arrays = case.arrays(xp)
    cufa.stats(reset=True)
    out, lse = cufa.attention_with_kvcache(**arrays, **case.options, return_lse=True)
    assert "attention_forward_cluster_cache_sm90" in str(cufa.stats())
    caches = to_numpy(arrays["k_cache"]), to_numpy(arrays["v_cache"])
    assert_kvcache_close(to_numpy(out), lse=to_numpy(lse), caches=caches, **case.arrays(), **case.options)
