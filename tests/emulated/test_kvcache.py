"""Attention over caches, run on the CPU and held to the reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import examples

import cufa
import emulated
from cufa.testing import KVCacheCase, assert_kvcache_close, kvcache_cases, to_numpy
from emulated.cases import ALIGNED, NARROW, ORDERS, Ran
from emulated.gpu import Gpu

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())


def attend(case: KVCacheCase, order: int | None = None, **gpu: Any) -> Ran:
    """Run a case on an emulated GPU, and hold what it makes, and the caches, to the reference."""
    with Gpu(order=order, **gpu) as device:
        arrays = case.arrays(device)
        options: dict[str, Any] = {**case.options, "num_splits": case.num_splits, "return_lse": case.return_lse}
        if case.use_out:
            options["out"] = case.output(device)
        found = cufa.attention_with_kvcache(**arrays, **options)
        results = tuple(map(to_numpy, found if case.return_lse else (found,)))
        caches = to_numpy(arrays["k_cache"]), to_numpy(arrays["v_cache"])
        entries = [launched.function.entry for launched in device.launches]
    out, lse = (*results, None)[:2]
    assert_kvcache_close(out, lse=lse, caches=caches, **case.arrays(), **case.options)
    return Ran((*results, *caches), entries)


def cases(dtype: str, head_dim: int, layouts: tuple[str, ...] = ALIGNED, **options: Any) -> st.SearchStrategy[Any]:
    """Cases of few kernels, each of which takes a second or two to compile."""
    plain = {"softcap": 0.0, "alibi_ndim": 0, "sinks": False, "window_size": None} | options
    cache_dtype = plain.pop("cache_dtype", "")
    drawn = kvcache_cases(
        dtypes=(dtype,), cache_dtypes=(cache_dtype,), head_dims=(head_dim,), layouts=layouts, wild=True
    )
    return drawn.map(lambda case: dataclasses.replace(case, **plain))


KINDS = {
    "float16": cases("float16", 64),
    "bfloat16": cases("bfloat16", 128, causal=True),
    "float32": cases("float32", 40, window_size=(30, 2)),
    "terms": cases("float16", 32, softcap=5.0, alibi_ndim=2, sinks=True, causal=True),
    "narrow": cases("bfloat16", 33, NARROW),
    "float8": cases("float16", 64, cache_dtype="float8_e4m3fn"),
    "float8 beside bfloat16": cases("bfloat16", 128, cache_dtype="float8_e4m3fn", causal=True, softcap=5.0),
    "float8, narrow": cases("float16", 41, NARROW, cache_dtype="float8_e4m3fn", window_size=(30, 2)),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(2, 12))
@given(data=st.data())
def test_caches_equal_reference(kind: str, data: st.DataObject) -> None:
    attend(data.draw(KINDS[kind]), data.draw(ORDERS), num_sms=data.draw(st.sampled_from((1, 3, 8))))


LONG: dict[str, Any] = {"batch": 3, "lengths": (300, 7, 130), "capacity": 400, "seqlen_new": 1, "dtype": "float16"}
LONG |= {"num_heads_q": 6, "num_heads_k": 2, "head_dim": 64, "head_dim_v": 64, "rotary_dim": 64, "return_lse": True}


@pytest.mark.parametrize("page_size", [0, 5, 32])
def test_bits_are_the_same_in_any_order(page_size: int) -> None:
    case = KVCacheCase(**LONG, page_size=page_size)
    ran = attend(case, num_sms=8)
    assert ran.entries == ["attention_cache_prepare", "attention_forward_cache_sm80"]
    for order in (1, 2):
        assert attend(case, order, num_sms=8).bits == ran.bits


@pytest.mark.parametrize("page_size", [5, 12, 16])
def test_keys_and_values_that_have_no_slots_in_common(page_size: int) -> None:
    """The bits are those of pages in which rows of k and v are found by one number, padding or not."""
    for leftpad in (None, (3, 0, 20)):
        case = KVCacheCase(**LONG | {"seqlen_new": None, "rotary_dim": 0, "leftpad": leftpad}, page_size=page_size)
        found = []
        for order in ((0, 1, 2, 3), (0, 2, 1, 3)):  # of axes in the memory of v_cache
            arrays = case.arrays()
            arrays["v_cache"] = np.ascontiguousarray(arrays["v_cache"].transpose(order)).transpose(order)
            with Gpu(num_sms=3) as gpu:
                placed = gpu.arrays(arrays)
                found.append(to_numpy(cufa.attention_with_kvcache(**placed, **case.options, num_splits=2)))
                caches = to_numpy(placed["k_cache"]), to_numpy(placed["v_cache"])
            assert_kvcache_close(found[-1], caches=caches, **arrays, **case.options)
        assert np.array_equal(*found)


def test_splits_of_their_own_make_results_the_same_in_any_batch() -> None:
    case = KVCacheCase(**LONG, num_splits=3, page_size=16)
    arrays = case.arrays()
    names = {name for name, array in arrays.items() if not name.endswith("_cache") and not name.startswith("rotary")}
    found = []
    for chosen in ([0, 1, 2], [2], [1, 2, 0]):
        with Gpu(num_sms=5) as gpu:
            own = {name: array[chosen] if name in names else array for name, array in arrays.items()}
            placed = gpu.arrays(own)
            out = cufa.attention_with_kvcache(**placed, **case.options, num_splits=3).numpy()
            found.append(dict(zip(chosen, out, strict=True)))
    assert all(np.array_equal(each[b], found[0][b]) for each in found for b in each)


def test_splits_of_their_own_make_packed_results_the_same_in_any_batch() -> None:
    own = {"lengths": (300, 40, 7, 130), "seqlen_q": (1, 33, 0, 5), "rotary_dim": 0}
    case = KVCacheCase(**{**LONG, "batch": 4, **own}, num_splits=2, page_size=16, causal=True)
    arrays = case.arrays()
    offsets = arrays["cu_seqlens_q"]
    found = []
    for chosen in ([0, 1, 2, 3], [0], [3, 1], [1, 2, 0]):
        rows = np.concatenate([np.arange(offsets[b], offsets[b + 1]) for b in chosen])
        own = arrays | {name: arrays[name][rows] for name in ("q", "k", "v")}
        own |= {name: arrays[name][chosen] for name in ("cache_seqlens", "block_table")}
        own["cu_seqlens_q"] = np.cumsum([0, *(np.diff(offsets)[chosen])], dtype=np.int32)
        with Gpu(num_sms=5) as gpu:
            out = cufa.attention_with_kvcache(**gpu.arrays(own), **case.options, num_splits=2).numpy()
        found.append(dict(zip(chosen, np.split(out, own["cu_seqlens_q"][1:-1]), strict=True)))
    assert all(np.array_equal(each[b], found[0][b]) for each in found for b in each)


def test_chunks_of_prompts_take_several_tiles() -> None:
    case = KVCacheCase(
        batch=4,
        seqlen_q=(1, 90, 0, 33),
        seqlen_new=1,
        lengths=(100, 40, 3, 0),
        capacity=170,
        page_size=16,
        num_heads_q=4,
        num_heads_k=1,
        head_dim=64,
        head_dim_v=64,
        dtype="bfloat16",
        causal=True,
        return_lse=True,
    )
    assert attend(case, num_sms=2).bits == attend(case, 3, num_sms=2).bits


@pytest.mark.parametrize("batch", [130, 300])
def test_many_short_sequences(batch: int) -> None:
    """Each thread block counts those of 130 by itself, and those of 300 are planned."""
    lengths = tuple(np.random.default_rng(0).integers(0, 40, batch).tolist())
    attend(KVCacheCase(batch=batch, lengths=lengths, capacity=40, dtype="float16", head_dim=32, head_dim_v=32), 1)


PLANNED = ("q", "k_cache", "v_cache", "k", "v", "cache_seqlens", "block_table", "cache_batch_idx", "cache_leftpad")
PLANNED += ("cu_seqlens_q",)


@settings(max_examples=examples(4, 8))
@given(case=KINDS["bfloat16"] | KINDS["float8"], order=ORDERS)
def test_plans_change_nothing(case: KVCacheCase, order: int | None) -> None:
    """Calls with a plan give the bits of those without, one after the other, as the counters are left as they were."""
    expected = attend(case, num_sms=2)
    with Gpu(num_sms=2, order=order) as gpu:
        given = case.arrays(gpu)
        options = {"causal": case.causal, "window_size": case.window_size, "num_splits": case.num_splits}
        plan = cufa.decode_plan(**{name: given[name] for name in PLANNED if name in given}, **options)
        for _ in range(3):
            arrays = case.arrays(gpu)
            found = cufa.attention_with_kvcache(
                **arrays, **case.options, num_splits=case.num_splits, return_lse=case.return_lse, plan=plan
            )
            results = map(to_numpy, found if case.return_lse else (found,))
            if not case.use_out:  # else rows that are no sequence's are kept
                assert all(
                    np.array_equal(x, y, equal_nan=True) for x, y in zip(results, expected.results, strict=False)
                )
            assert arrays["k_cache"].numpy().tobytes() == expected.results[-2].tobytes()
        entries = [launched.function.entry for launched in gpu.launches]
        assert entries.count("attention_cache_prepare") <= 1 + 3 * (case.seqlen_new is not None)


def test_plans_are_made_again_in_place() -> None:
    lengths = ((300, 7, 130), (17, 399, 0), (398, 64, 50))
    cases = [KVCacheCase(**{**LONG, "lengths": each}, page_size=16) for each in lengths]
    with Gpu(num_sms=8) as gpu:
        first = cases[0].arrays(gpu)
        seqlens = first["cache_seqlens"]
        plan = cufa.decode_plan(**{name: first[name] for name in PLANNED if name in first})
        for case in cases:
            gpu.memory.view(seqlens.address, seqlens.shape, seqlens.strides, np.int32)[...] = case.lengths
            plan.update()
            arrays = {**case.arrays(gpu), "cache_seqlens": seqlens}
            out = cufa.attention_with_kvcache(**arrays, **case.options, plan=plan).numpy()
            caches = arrays["k_cache"].numpy(), arrays["v_cache"].numpy()
            assert_kvcache_close(out, caches=caches, **case.arrays(), **case.options)
        given = np.array([1, 2, 3], np.int32)
        plan.update(gpu.array(given))
        with pytest.raises(ValueError, match="decode_plan: cache_seqlens has 2 entries"):
            plan.update(gpu.array(given[:2]))


def test_plans_of_other_calls_are_refused() -> None:
    case = KVCacheCase(**LONG, page_size=16)
    with Gpu(num_sms=8) as gpu:
        arrays = case.arrays(gpu)
        plan = cufa.decode_plan(**{name: arrays[name] for name in PLANNED if name in arrays})
        with pytest.raises(ValueError, match="plan was made for num_splits 0, and this call has 2"):
            cufa.attention_with_kvcache(**arrays, **case.options, num_splits=2, plan=plan)
        gpu.synchronize()
    with Gpu(num_sms=1) as other, pytest.raises(ValueError, match="words, but"):
        arrays = case.arrays(other)
        moved = dataclasses.replace(plan, memory=other.array(np.zeros(plan.memory.shape, np.int32)))
        cufa.attention_with_kvcache(**arrays, **case.options, plan=moved)
