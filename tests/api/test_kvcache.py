"""What attention with caches promises, on a machine without a GPU; and what it refuses, before anything is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import cufa
from cufa.testing import KVCacheCase, kvcache_cases

CACHES = ("k_cache", "v_cache")
CASE = KVCacheCase(batch=2, seqlen_q=2, seqlen_new=2, lengths=(3, 9), capacity=16, num_heads_q=4, num_heads_k=2)
PAGED = replace(CASE, page_size=4)
PACKED = replace(CASE, seqlen_q=(3, 1))
ROTARY = replace(CASE, rotary_dim=8)


def attend(case: KVCacheCase, arrays: dict[str, Any]) -> Any:
    return cufa.attention_with_kvcache(**arrays, **case.options, return_lse=True)


def same(first: Any, second: Any) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


@settings(max_examples=60)
@given(kvcache_cases(max_seqlen=40, page_sizes=(1, 3, 16)), st.integers(0, 2**32 - 1))
def test_where_pages_lie_changes_no_bit(case: KVCacheCase, seed: int) -> None:
    one, other = case.arrays(), case.arrays()
    order = np.random.default_rng(seed).permutation(case.num_caches)
    table = one["block_table"]
    there = (table >= 0) & (table < len(order))
    other["block_table"] = np.where(there, np.argsort(order)[np.where(there, table, 0)], -7).astype(np.int32)
    other |= {name: one[name][order] for name in CACHES}
    assert same(attend(case, one), attend(case, other))
    assert same([one[name][order] for name in CACHES], [other["k_cache"], other["v_cache"]])


@settings(max_examples=60)
@given(kvcache_cases(max_seqlen=40, page_sizes=(1, 3, 16)))
def test_pages_are_as_good_as_contiguous_caches(case: KVCacheCase) -> None:
    assume(case.batch)
    arrays = case.arrays()
    table = np.clip(arrays["block_table"], 0, case.num_caches - 1)
    gathered = {
        name: arrays[name][table].reshape(case.batch, table.shape[1] * case.page_size, *arrays[name].shape[2:])
        for name in CACHES
    }
    contiguous = {name: x for name, x in arrays.items() if name != "block_table"} | gathered
    assert same(attend(case, arrays), attend(case, contiguous))


@settings(max_examples=60)
@given(kvcache_cases(max_seqlen=40, page_sizes=(0,)), st.data())
def test_what_is_appended_first_is_as_good_as_all_along(case: KVCacheCase, data: Any) -> None:
    assume(case.batch)
    case = replace(case, rotary_dim=0)
    arrays = case.arrays()
    out, lse = attend(case, arrays)
    lengths = np.array([last for _, _, last in case.ranges()], np.int32)
    later = {name: x for name, x in arrays.items() if name not in ("k", "v")} | {"cache_seqlens": lengths}
    assert same([out, lse], attend(case, later))
    # A sequence has the same results where its keys are all that there are.
    b = data.draw(st.integers(0, case.batch - 1))
    place, keys = (
        arrays["cache_batch_idx"][b] if case.use_cache_batch_idx else b,
        slice(case.ranges()[b][0], lengths[b]),
    )
    rows: Any = b
    if isinstance(case.seqlen_q, tuple):
        rows = slice(sum(case.seqlen_q[:b]), sum(case.seqlen_q[: b + 1]))
    q = arrays["q"][rows][None]
    k, v = (arrays[name][None, place, keys] for name in CACHES)
    shared = {name: arrays[name] for name in ("alibi_slopes", "sinks") if name in arrays}
    if case.alibi_ndim == 2:
        shared["alibi_slopes"] = shared["alibi_slopes"][b]
    options = {name: value for name, value in case.options.items() if name != "rotary_interleaved"}
    own = cufa.attention(q, k, v, **options, **shared, return_lse=True)
    assert same([out[rows], lse[:, rows] if lse.ndim == 2 else lse[rows]], [x[0] for x in own])


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_scores_depend_on_how_far_rotated_rows_are_apart(causal: bool, interleaved: bool) -> None:
    """One row after the other, and all at once; moved along, as `cache_leftpad` moves them, they score the same."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 6, 2, 16))
    angles = np.outer(np.arange(20), [0.3, 0.1, 0.03])
    rotary = {"rotary_cos": np.cos(angles), "rotary_sin": np.sin(angles), "rotary_interleaved": interleaved}
    found = []
    for start, leftpad in ((0, 0), (11, 11)):
        caches, rows = np.full((2, 1, 20, 2, 16), np.nan), []
        for i in range(start, start + 6):
            at = slice(i - start, i - start + 1)
            given_now: dict[str, Any] = {"cache_seqlens": np.array([i], np.int32)}
            given_now["cache_leftpad"] = np.array([leftpad], np.int32)
            given_now |= {"k": k[:, at], "v": v[:, at], **rotary}
            rows.append(cufa.attention_with_kvcache(q[:, at], *caches, **given_now, causal=causal))
        found.append(np.concatenate(rows, axis=1))
    np.testing.assert_allclose(*found, atol=1e-12)
    caches = np.full((2, 1, 20, 2, 16), np.nan)
    zero = np.zeros(1, np.int32)
    at_once = cufa.attention_with_kvcache(q, *caches, k=k, v=v, cache_seqlens=zero, causal=True, **rotary)
    np.testing.assert_allclose(at_once, found[0], atol=1e-12)
    plain = cufa.attention(q, k, v, causal=True)
    assert np.abs(at_once - plain).max() > 1e-3


@pytest.mark.parametrize("case", [CASE, PAGED, PACKED, ROTARY], ids=["contiguous", "paged", "packed", "rotary"])
def test_a_sequence_is_the_same_bits_beside_any_others(case: KVCacheCase) -> None:
    arrays = case.arrays()
    out, lse = attend(case, case.arrays())
    one = {name: x[1:] for name, x in arrays.items() if name in ("cache_seqlens", "block_table")}
    rows = slice(3, 4) if case is PACKED else slice(1, 2)
    one |= {name: arrays[name][rows] for name in ("q", "k", "v")}
    one |= {name: arrays[name] if case is PAGED else arrays[name][1:] for name in CACHES}
    one |= {"cu_seqlens_q": np.array([0, 1], np.int32)} if case is PACKED else {}
    one |= {name: arrays[name] for name in ("rotary_cos", "rotary_sin") if name in arrays}
    assert same(attend(case, one), [out[rows], lse[:, rows] if case is PACKED else lse[rows]])


def test_sequences_without_keys_or_rows() -> None:
    lengths, table = np.array([0, 0], np.int32), np.full((2, 3), -9, np.int32)
    q, pages = np.ones((2, 3, 4, 8), np.float32), np.full((2, 4, 5, 2, 8), np.nan, np.float32)
    out, lse = cufa.attention_with_kvcache(q, *pages, cache_seqlens=lengths, block_table=table, return_lse=True)
    assert (out == 0).all() and np.isneginf(lse).all()
    out, lse = cufa.attention_with_kvcache(
        q[0], *pages, cache_seqlens=lengths, block_table=table, cu_seqlens_q=np.zeros(3, np.int32), return_lse=True
    )
    assert (out == 0).all() and np.isneginf(lse).all()
    for shape in ((0, 3, 4, 8), (2, 0, 4, 8)):
        caches = np.zeros((2, shape[0], 5, 2, 8), np.float32)
        assert cufa.attention_with_kvcache(np.zeros(shape, np.float32), *caches).shape == shape


def test_rows_of_no_sequence() -> None:
    arrays = replace(PACKED, seqlen_new=None).arrays()
    arrays["cu_seqlens_q"] = np.array([0, 2, 3], np.int32)
    out, lse = cufa.attention_with_kvcache(**arrays, return_lse=True)
    assert (out[3] == 0).all() and np.isneginf(lse[:, 3]).all() and np.isfinite(lse[:, :3]).all()
    kept = np.full_like(out, 7)
    cufa.attention_with_kvcache(**arrays, out=kept)
    assert (kept[3] == 7).all() and (kept[:3] == out[:3]).all()


def test_caches_that_are_only_read_may_be_read_only() -> None:
    arrays = CASE.arrays()
    for name in CACHES:
        arrays[name].flags.writeable = False
    with pytest.raises(ValueError, match="k_cache is read-only"):
        cufa.attention_with_kvcache(**arrays)
    for name in ("k", "v"):
        arrays.pop(name)
    assert cufa.attention_with_kvcache(**arrays).shape == arrays["q"].shape


def test_pages_of_k_and_v_may_lie_side_by_side() -> None:
    arrays, pool = PAGED.arrays(), np.zeros((10, 2, 4, 2, 16), np.float32)
    pool[:, 0], pool[:, 1] = arrays["k_cache"], arrays["v_cache"]
    expected = attend(PAGED, arrays)
    assert same(expected, attend(PAGED, arrays | {"k_cache": pool[:, 0], "v_cache": pool[:, 1]} | PAGED_ROWS))
    with pytest.raises(ValueError, match=r"k_cache overlaps v_cache"):
        attend(PAGED, arrays | {"k_cache": pool[:, 0], "v_cache": pool[:, 0]})


def test_pages_of_k_and_v_may_take_turns_in_one_pool() -> None:
    """As transformers lays them, for all layers: each cache is the pool from its own first page on."""
    arrays, pool = PAGED.arrays(), np.full((11, 3, 4, 2, 16), np.nan, np.float32)
    pool[:10, 1], pool[:10, 2] = arrays["k_cache"], arrays["v_cache"]
    before, table = pool.copy(), arrays["block_table"]
    expected = attend(PAGED, arrays)
    pages = pool.reshape(33, 4, 2, 16)
    caches = {"k_cache": pages[1:32], "v_cache": pages[2:]}
    shared = arrays | caches | PAGED_ROWS
    assert same(expected, attend(PAGED, shared | {"block_table": 3 * table}))
    assert same((pool[:10, 1], pool[:10, 2]), (arrays["k_cache"], arrays["v_cache"]))  # rows were appended to both
    assert np.isnan(pool[:, 0]).all() and not same((before,), (pool,))
    before = pool.copy()
    for shift in (1, -1):  # the page that sequence 1 appends to is one of another kind of sequence 0
        wrong = 3 * table
        wrong[1, 2] = wrong[0, 0] + shift
        page = max(wrong[1, 2], wrong[0, 0])
        with pytest.raises(ValueError, match=f"page {page} of k_cache is page {page - 1} of v_cache; pass a pool with"):
            attend(PAGED, shared | {"block_table": wrong})
    rows = pool.reshape(132, 2, 16)
    for v_cache in (caches["k_cache"], rows[6:130].reshape(31, 4, 2, 16)):  # the same pages, and others' rows
        with pytest.raises(ValueError, match="k_cache overlaps v_cache"):
            attend(PAGED, shared | {"block_table": 3 * arrays["block_table"], "v_cache": v_cache})
    assert pool.tobytes() == before.tobytes()


def test_a_pool_without_sequences() -> None:
    pool, table = np.zeros((4, 4, 2, 16), np.float32), np.zeros((0, 2), np.int32)
    rows = {name: np.zeros((0, 2, 2, 16), np.float32) for name in ("k", "v")}
    shared = {"q": np.zeros((0, 2, 4, 16), np.float32), "k_cache": pool[:3], "v_cache": pool[1:], **rows}
    out = cufa.attention_with_kvcache(**shared, cache_seqlens=np.zeros(0, np.int32), block_table=table)
    assert out.shape == (0, 2, 4, 16)


PAGED_ROWS = {name: PAGED.arrays()[name] for name in ("k", "v")}


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


E4M3 = ml_dtypes.float8_e4m3fn
EIGHT_BITS = replace(CASE, dtype="float16", cache_dtype="float8_e4m3fn")

TURN = {"rotary_cos": zeros(99, 4), "rotary_sin": zeros(99, 4)}

WRONG: list[tuple[KVCacheCase, dict[str, Any], type[Exception], str]] = [
    (CASE, {"v_cache": None}, TypeError, "v_cache is None"),
    (CASE, {"q": zeros(4, 4, 16)}, ValueError, "q has shape .* 4 dimensions"),
    (PACKED, {"q": zeros(1, 4, 4, 16)}, ValueError, "q has shape .* 3 dimensions .* cu_seqlens_q is given"),
    (CASE, {"k_cache": zeros(2, 16, 16)}, ValueError, "k_cache has shape .*num_caches, capacity"),
    (PAGED, {"k_cache": zeros(2, 16, 16)}, ValueError, "k_cache has shape .*num_pages, page_size"),
    (CASE, {"v_cache": zeros(2, 15, 2, 16)}, ValueError, "must agree in num_caches, capacity"),
    (CASE, {"k_cache": zeros(2, 16, 2, 17)}, ValueError, "k_cache has head_dim 17 but q has 16"),
    (CASE, {"v_cache": zeros(2, 16, 1, 16)}, ValueError, "v_cache has 1 heads but k_cache has 2"),
    (CASE, {"q": zeros(2, 2, 3, 16)}, ValueError, "q has 3 heads and k_cache has 2"),
    (CASE, {"k_cache": zeros(2, 16, 2, 16, dtype=np.float64)}, ValueError, "q, k_cache and v_cache must agree"),
    (CASE, {"k_cache": zeros(3, 16, 2, 16), "v_cache": zeros(3, 16, 2, 16)}, ValueError, "3 caches but .* 2 seq"),
    (CASE, {"cache_batch_idx": int32(0)}, ValueError, "cache_batch_idx has 1 entries"),
    (CASE, {"cache_batch_idx": int32(0, 2)}, ValueError, "cache_batch_idx is 2 for sequence 1; .* the last cache, 1"),
    (CASE, {"cache_batch_idx": int32(1, 1), "cache_seqlens": int32(4, 3)}, ValueError, "appends to row 4 of cache 1"),
    (CASE, {"cache_seqlens": int32(3, 15)}, ValueError, "sequence 1 has 15 keys .* 2 are appended, .* room for 16"),
    (CASE, {"cache_seqlens": int32(-1, 3)}, ValueError, "cache_seqlens is -1 for sequence 0; .* the capacity, 16"),
    (CASE, {"cache_seqlens": np.zeros(2, np.int64)}, ValueError, "cache_seqlens has dtype int64; pass int32"),
    (CASE, {"cache_seqlens": int32(3)}, ValueError, "cache_seqlens has 1 entries"),
    (CASE, {"cache_seqlens": None}, TypeError, "without cache_seqlens caches are full"),
    (CASE, {"cache_leftpad": int32(6, 0)}, ValueError, "cache_leftpad is 6 for sequence 0; .* its number of keys, 5"),
    (CASE, {"v": None}, TypeError, "k is given alone"),
    (CASE, {"k": zeros(2, 3, 2, 16)}, ValueError, "v has 2 rows but k has 3"),
    (CASE, {"k": zeros(2, 2, 1, 16)}, ValueError, "k has shape .* seqlen_new"),
    (PACKED, {"k": zeros(2, 2, 2, 16)}, ValueError, "k has shape .* packed like q"),
    (CASE, {"k": zeros(2, 2, 2, 16, dtype=np.float16)}, ValueError, "k has dtype float16 but k_cache has float32"),
    (PACKED, {"cu_seqlens_q": int32(0, 5, 4)}, ValueError, "cu_seqlens_q holds 5"),
    (PAGED, {"block_table": int32(0, 1)}, ValueError, r"block_table has shape \(2,\); \(batch, max_pages\)"),
    (PAGED, {"block_table": zeros(3, 4, dtype=np.int32)}, ValueError, "block_table has 3 rows"),
    (PAGED, {"cache_batch_idx": int32(0, 1)}, ValueError, "cache_batch_idx is given, but rows of block_table"),
    (PAGED, {"k_cache": zeros(0, 4, 2, 16), "v_cache": zeros(0, 4, 2, 16)}, ValueError, "k_cache has no pages"),
    (PAGED, {"k_cache": zeros(9, 0, 2, 16), "v_cache": zeros(9, 0, 2, 16)}, ValueError, "pages of no rows"),
    (CASE, {"rotary_cos": zeros(99, 4)}, TypeError, "rotary_cos is given alone"),
    (CASE, {**TURN, "k": None, "v": None}, TypeError, "but no k"),
    (CASE, {**TURN, "rotary_cos": zeros(99, 9), "rotary_sin": zeros(99, 9)}, ValueError, "head_dim, which is 16"),
    (CASE, {**TURN, "rotary_sin": zeros(98, 4)}, ValueError, "they must agree"),
    (CASE, {**TURN, "rotary_sin": zeros(99, 4, dtype=np.float16)}, ValueError, "rotary_sin has dtype float16"),
    (CASE, {"rotary_cos": zeros(10, 4), "rotary_sin": zeros(10, 4)}, ValueError, "10 positions, but one of 10"),
    (CASE, {"num_splits": 257}, ValueError, "num_splits is 257"),
    (CASE, {"num_splits": 1.0}, TypeError, "num_splits is a float"),
    (CASE, {"rotary_interleaved": 1}, TypeError, "rotary_interleaved is a int"),
    (CASE, {"plan": 1}, TypeError, "plan is a int"),
    (CASE, {"out": zeros(2, 2, 4, 15)}, ValueError, "out has shape"),
    (CASE, {"k_descale": zeros(2)}, ValueError, "k_descale is given, but k_cache has dtype float32; only caches of"),
    (CASE, {"cache_dtype": "float8_e4m3fn"}, ValueError, "k_cache has dtype float32; it is for caches of uint8"),
    (CASE, {"k_cache": zeros(2, 16, 2, 16, dtype=np.uint8)}, ValueError, "dtype uint8; say by cache_dtype what"),
    (
        CASE,
        {"k_cache": zeros(2, 16, 2, 16, dtype=E4M3)},
        ValueError,
        "v_cache has dtype float32 but k_cache has float8",
    ),
    (EIGHT_BITS, {"cache_dtype": "float8_e5m2"}, ValueError, "cache_dtype is 'float8_e5m2'; pass float8_e4m3fn"),
    (EIGHT_BITS, {"cache_dtype": 8}, TypeError, "cache_dtype is a int"),
    (EIGHT_BITS, {"k": zeros(2, 2, 2, 16, dtype=E4M3)}, ValueError, "k has dtype float8_e4m3fn but q has float16"),
    (EIGHT_BITS, {"k_descale": np.ones((2, 4), np.float32)}, ValueError, r"k_descale has shape .* \(\), \(2,\) or"),
    (EIGHT_BITS, {"v_descale": np.ones(2, np.float16)}, ValueError, "v_descale has dtype float16; pass float32"),
    (EIGHT_BITS, {"v_descale": zeros(2)}, ValueError, r"v_descale holds 0.0; pass numbers from 2\^-126"),
    (EIGHT_BITS, {"k_descale": np.full((), np.nan, np.float32)}, ValueError, "k_descale holds nan"),
]


@pytest.mark.parametrize(("case", "changed", "kind", "text"), WRONG)
def test_what_is_wrong_is_said_before_anything_is_written(
    case: KVCacheCase, changed: dict[str, Any], kind: type[Exception], text: str
) -> None:
    arrays = case.arrays() | changed
    before = {name: arrays[name].copy() for name in CACHES if arrays[name] is not None}
    with pytest.raises(kind, match=f"^attention_with_kvcache: .*{text}"):
        cufa.attention_with_kvcache(**arrays)
    for name, cache in before.items():
        assert cache.tobytes() == arrays[name].tobytes()


def test_pages_that_are_not_there_are_refused_where_keys_are() -> None:
    arrays = PAGED.arrays()  # of pages of 4, the second sequence has 11 keys, so that its last page is the third
    arrays["block_table"][1, 2] = 99
    with pytest.raises(ValueError, match=r"block_table\[1, 2\] is 99, a page that sequence 1 uses; there are 10 pages"):
        cufa.attention_with_kvcache(**arrays)
    arrays = PAGED.arrays()
    arrays["block_table"][1, 0] = -1  # before its first key
    arrays["cache_leftpad"] = int32(0, 4)
    assert np.isfinite(cufa.attention_with_kvcache(**arrays)).all()


def test_results_share_no_memory_with_caches() -> None:
    arrays = CASE.arrays()
    with pytest.raises(ValueError, match="out overlaps k_cache"):
        cufa.attention_with_kvcache(**arrays, out=arrays["k_cache"].reshape(-1)[: 2 * 2 * 4 * 16].reshape(2, 2, 4, 16))
    arrays["k"] = arrays["k_cache"][:, :2]
    with pytest.raises(ValueError, match="k_cache overlaps k;"):
        cufa.attention_with_kvcache(**arrays)


def test_jax_arrays_cannot_change_in_place() -> None:
    jax = pytest.importorskip("jax")
    arrays = {name: jax.numpy.asarray(x) for name, x in CASE.arrays().items()}
    with pytest.raises(NotImplementedError, match="attention_with_kvcache: JAX arrays cannot change in place"):
        cufa.attention_with_kvcache(**arrays)


class Foreign:
    """A NumPy array that shows nothing but DLPack, and copies itself unless it is told not to."""

    device = "cpu"

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, *, copy: bool | None = None, **options: Any) -> Any:
        return self.array.__dlpack__(copy=copy is None, **options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def test_rows_are_appended_to_the_memory_of_foreign_arrays() -> None:
    arrays, expected = CASE.arrays(), CASE.arrays()
    foreign: dict[str, Any] = {name: Foreign(x) for name, x in arrays.items()}
    out = np.empty_like(arrays["q"])
    cufa.attention_with_kvcache(**foreign, out=Foreign(out))
    assert same([out], [cufa.attention_with_kvcache(**expected)])
    assert same([arrays[name] for name in CACHES], [expected[name] for name in CACHES])
    assert not same([arrays["k_cache"]], [CASE.arrays()["k_cache"]])
