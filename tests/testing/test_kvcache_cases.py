"""The reference of attention with caches beside the mathematics, and what `assert_kvcache_close` sees and lets pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from cufa import reference
from cufa.testing import KVCacheCase, assert_kvcache_close, kvcache_cases

CASE = KVCacheCase(
    batch=3,
    seqlen_q=2,
    seqlen_new=2,
    lengths=(9, 30, 17),
    capacity=48,
    page_size=8,
    leftpad=(2, 0, 5),
    num_heads_q=4,
    num_heads_k=2,
    rotary_dim=12,
    causal=True,
    dtype="float16",
)


CACHE_DTYPES = ("", "float8_e4m3fn")


@settings(max_examples=100)
@given(kvcache_cases(max_seqlen=40, wild=True, cache_dtypes=CACHE_DTYPES))
def test_the_reference_is_close_to_itself(case: KVCacheCase) -> None:
    arrays = case.arrays()
    found = reference.attention_with_kvcache(**arrays, **case.options)
    out, caches = found.out.astype(arrays["q"].dtype), (found.k_cache, found.v_cache)
    assert_kvcache_close(out, lse=found.lse, caches=caches, **arrays, **case.options)


@settings(max_examples=100)
@given(kvcache_cases(max_seqlen=40, cache_dtypes=CACHE_DTYPES))
def test_what_is_not_live_is_dead_in_cases(case: KVCacheCase) -> None:
    """Cases are valid: live keys are finite, and neither page nor cache is two sequences' that write."""
    arrays = case.arrays()
    found = reference.attention_with_kvcache(**arrays, **case.options)
    assert np.isfinite(found.out).all()
    written: set[tuple[int, int]] = set()
    for b, (_, first, last) in enumerate(case.ranges()):
        for key in range(first, last):
            page, row = divmod(key, case.page_size) if case.page_size else (b, key)
            place = arrays["block_table"][b, page] if case.page_size else page
            assert (place, row) not in written
            written.add((place, row))


def attend(arrays: dict[str, Any], **options: Any) -> tuple[Any, Any, Any, Any]:
    found = reference.attention_with_kvcache(**arrays, **{**CASE.options, **options})
    return found.out.astype(np.float16), found.lse.astype(np.float32), found.k_cache, found.v_cache


Fault = Callable[[dict[str, Any]], tuple[Any, Any, Any, Any]]


def changed(index: int, *at: Any) -> Fault:
    """A result, or a cache, of which something is another number."""

    def fault(arrays: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
        found = attend(arrays)
        found[index][at] = np.where(np.isfinite(found[index][at]), 1.5 * found[index][at] + 0.1, 0)
        return found

    return fault


def unlike(**others: Any) -> Fault:
    """Results of another call, with the caches of this one."""
    return lambda arrays: (*attend(arrays | others)[:2], *attend(arrays)[2:])


FAULTS: dict[str, Fault] = {
    "an element of out": changed(0, 1, 1, 3, 5),
    "an lse": changed(1, 1, 2, 1),
    "zeros": lambda arrays: (np.zeros_like(arrays["q"]), *attend(arrays)[1:]),
    "no leftpad": unlike(cache_leftpad=np.zeros(3, np.int32)),
    "one key less": unlike(cache_seqlens=np.array([8, 29, 16], np.int32)),
    "q not rotated": unlike(rotary_cos=np.ones((50, 6)), rotary_sin=np.zeros((50, 6))),
    "no mask": lambda arrays: (*attend(arrays, causal=False)[:2], *attend(arrays)[2:]),
    "the other pairs": lambda arrays: attend(arrays, rotary_interleaved=False),
    "k not appended": lambda arrays: (*attend(arrays)[:2], arrays["k_cache"], attend(arrays)[3]),
    "v not appended": lambda arrays: (*attend(arrays)[:3], arrays["v_cache"]),
    "k not rotated": lambda arrays: attend({n: x for n, x in arrays.items() if not n.startswith("rotary")}),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults_are_seen(fault: Fault) -> None:
    arrays = CASE.arrays()
    out, lse, *caches = attend(arrays)
    assert_kvcache_close(out, lse=lse, caches=(caches[0], caches[1]), **arrays, **CASE.options)
    out, lse, *caches = fault(arrays)
    with pytest.raises(AssertionError):
        assert_kvcache_close(out, lse=lse, caches=(caches[0], caches[1]), **arrays, **CASE.options)


SCALED = replace(CASE, cache_dtype="float8_e4m3fn", descale_ndim=2)
SCALED_FAULTS: dict[str, dict[str, Any]] = {
    "no k_descale": {"k_descale": None},
    "no v_descale": {"v_descale": None},
    "the scales of another sequence": {"k_descale": SCALED.arrays()["k_descale"][::-1]},
}


@pytest.mark.parametrize("others", SCALED_FAULTS.values(), ids=SCALED_FAULTS)
def test_scales_that_are_not_applied_are_seen(others: dict[str, Any]) -> None:
    arrays = SCALED.arrays()
    out, lse, *caches = attend(arrays)
    assert_kvcache_close(out, lse=lse, caches=(caches[0], caches[1]), **arrays, **SCALED.options)
    unscaled, *_ = attend(arrays | others)
    with pytest.raises(AssertionError, match="out differs"):
        assert_kvcache_close(unscaled, caches=(caches[0], caches[1]), **arrays, **SCALED.options)


def test_any_other_bit_of_a_cache_is_seen() -> None:
    arrays = CASE.arrays()
    out, _, k_cache, v_cache = attend(arrays)
    for cache in (k_cache, v_cache):
        bits = cache.view(np.uint16).reshape(-1)
        for at in np.random.default_rng(0).integers(0, bits.size, 20):
            bits[at] ^= 0x8000  # of a NaN, this is seen too; rotated rows' numbers are no neighbours of their negatives
            with pytest.raises(AssertionError, match=r"[kv]_cache is wrong in 1 of"):
                assert_kvcache_close(out, caches=(k_cache, v_cache), **arrays, **CASE.options)
            bits[at] ^= 0x8000


def test_products_in_float32_may_round_either_way() -> None:
    """Rotated by numbers of float32, as kernels do, a few numbers of many are others than in float64."""
    case = replace(CASE, seqlen_new=2, lengths=(0, 0, 0), leftpad=None, head_dim=256, rotary_dim=256, page_size=0)
    case = replace(case, seqlen_q=100, seqlen_new=100, capacity=100, num_heads_k=4)
    arrays = case.arrays()
    found = reference.attention_with_kvcache(**arrays, **case.options)
    cos, sin = (arrays[name][:100, None] for name in ("rotary_cos", "rotary_sin"))
    q, k = arrays["q"].copy(), arrays["k"].copy()
    for x in (q, k):
        a, b = x[..., 0::2].astype(np.float32), x[..., 1::2].astype(np.float32)
        x[..., 0::2], x[..., 1::2] = a * cos - b * sin, a * sin + b * cos
    assert 0 < np.count_nonzero(k != found.k_cache) < 1e-3 * k.size
    out, lse = reference.attention(q, k, arrays["v"], causal=True, return_lse=True)
    caches = k, found.v_cache
    assert_kvcache_close(out.astype(np.float16), lse=lse, caches=caches, **arrays, **case.options)


def test_numbers_that_are_not_there_are_clamped() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 2, 1, 4))
    caches = rng.standard_normal((2, 2, 5, 1, 4))
    full = reference.attention_with_kvcache(q, *caches)
    lengths = np.array([9, -4], np.int32)
    found = reference.attention_with_kvcache(q, *caches, k=k, v=v, cache_seqlens=lengths)
    assert (found.k_cache[0] == caches[0, 0]).all() and (found.out[0] == full.out[0]).all()
    assert (found.k_cache[1, :2] == k[1]).all()
    assert (found.out[1] == reference.attention(q[1:], k[1:], v[1:])).all()
    late = reference.attention_with_kvcache(q, *caches, k=k, v=v, cache_seqlens=np.array([4, 0], np.int32))
    assert (late.v_cache[0, 4] == v[0, 0]).all() and (late.v_cache[0, :4] == caches[1, 0, :4]).all()
    table = np.array([[7, 1], [-1, 0]], np.int32)
    paged = reference.attention_with_kvcache(
        q, *caches, k=k, v=v, block_table=table, cache_seqlens=np.array([4, 4], np.int32)
    )
    assert (paged.k_cache[0, 0] == k[1, 1]).all() and (paged.k_cache[1, 0] == k[0, 1]).all()
    assert (paged.k_cache[:, 1:] == caches[0, :, 1:]).all()
    for b, pages in ((0, (1, 1)), (1, (0, 0))):  # those that are not there are read as the nearest
        keys, values = (np.concatenate([x[pages[0]], x[pages[1], :1]])[None] for x in paged[2:])
        assert (paged.out[b] == reference.attention(q[b : b + 1], keys, values)[0]).all()
