"""On a GPU: attention over caches is what the reference says, in any batch, in graphs, and in traces of serving."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import places
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cufa
from cufa._operations import call as _call
from cufa.testing import LAYOUTS, KVCacheCase, assert_kvcache_close, kvcache_cases, to_numpy

pytestmark = pytest.mark.gpu

PLANNED = ("q", "k_cache", "v_cache", "k", "v", "cache_seqlens", "block_table", "cache_batch_idx", "cache_leftpad")
PLANNED += ("cu_seqlens_q",)
"""The arrays of a call that a plan is made of."""


def framework(name: str) -> ModuleType:
    module = pytest.importorskip(name)
    if name == "cupy":
        module.cuda.Device(0).use()
    return module


@pytest.fixture
def cupy() -> Any:
    return framework("cupy")


def plan_of(arrays: dict[str, Any], **options: Any) -> cufa.DecodePlan:
    return cufa.decode_plan(**{name: arrays[name] for name in PLANNED if name in arrays}, **options)


def attend(case: KVCacheCase, xp: Any, planned: bool = False) -> tuple[Any, ...]:
    """Run a case: its results and the caches afterwards."""
    arrays = case.arrays(xp)
    options: dict[str, Any] = {**case.options, "num_splits": case.num_splits, "return_lse": case.return_lse}
    if xp.__name__ == "cupy" and case.cache_dtype:
        options["cache_dtype"] = case.cache_dtype
    if planned:
        own = {
            name: options[name] for name in ("causal", "window_size", "num_splits", "cache_dtype") if name in options
        }
        options["plan"] = plan_of(arrays, **own)
    if case.use_out:
        options["out"] = case.output(xp)
    found = cufa.attention_with_kvcache(**arrays, **options)
    return (*(found if case.return_lse else (found, None)), arrays["k_cache"], arrays["v_cache"])


def check(case: KVCacheCase, xp: Any, planned: bool = False) -> None:
    out, lse, *caches = attend(case, xp, planned)
    assert_kvcache_close(out, lse=lse, caches=(caches[0], caches[1]), **case.arrays(), **case.options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["cupy", "torch"])
@settings(max_examples=7)
@given(data=st.data())
def test_caches_equal_reference(name: str, dtype: str, data: st.DataObject) -> None:
    xp = framework(name)
    layouts = tuple(layout for layout in LAYOUTS if name == "cupy" or layout != "reversed")
    cases = kvcache_cases(dtypes=(dtype,), layouts=layouts, wild=name == "cupy")
    check(data.draw(cases), xp, data.draw(st.booleans()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["cupy", "torch"])
@settings(max_examples=10)
@given(data=st.data())
def test_caches_of_eight_bits_equal_reference(name: str, dtype: str, data: st.DataObject) -> None:
    xp = framework(name)
    layouts = tuple(layout for layout in LAYOUTS if name == "cupy" or layout != "reversed")
    own: dict[str, Any] = {"dtypes": (dtype,), "cache_dtypes": ("float8_e4m3fn",), "layouts": layouts}
    check(data.draw(kvcache_cases(**own, wild=name == "cupy")), xp, data.draw(st.booleans()))


EIGHT_BITS: dict[str, Any] = {"cache_dtype": "float8_e4m3fn", "descale_ndim": 2}

SERVING: dict[str, Any] = {
    "dtype": "bfloat16",
    "num_heads_q": 8,
    "num_heads_k": 2,
    "head_dim": 128,
    "head_dim_v": 128,
    "page_size": 16,
    "rotary_dim": 128,
    "return_lse": True,
}


@pytest.mark.parametrize(
    "changed",
    [
        *({}, {"page_size": 0}, {"page_size": 7}, {"seqlen_q": 40, "seqlen_new": 40}),
        *(EIGHT_BITS, EIGHT_BITS | {"page_size": 0, "dtype": "float16", "seqlen_q": 40, "seqlen_new": 40}),
    ],
    ids=str,
)
def test_long_caches(changed: dict[str, Any], cupy: Any) -> None:
    lengths = (9000, 3, 2100, 0, 5000)
    case = KVCacheCase(batch=5, lengths=lengths, seqlen_new=1, capacity=9100, causal=True, **SERVING)
    check(replace(case, **changed), cupy)


@pytest.mark.parametrize("changed", [{}, {"page_size": 0}, EIGHT_BITS], ids=str)
def test_caches_longer_than_16_bits_count(changed: dict[str, Any], cupy: Any) -> None:
    one = SERVING | {"num_heads_q": 4, "num_heads_k": 1}
    case = KVCacheCase(batch=2, lengths=(66_000, 3), seqlen_new=1, capacity=66_100, causal=True, **one)
    check(replace(case, **changed), cupy)


CHUNKS = SERVING | {"batch": 4, "seqlen_q": 384, "seqlen_new": 384, "lengths": (4500, 0, 2000, 77), "capacity": 5000}
CHUNKS |= {"causal": True, "page_size": 64}
"""Chunks of prompts, which have large tiles."""


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"page_size": 0},
        {"page_size": 0, "leftpad": (2500, 3, 0, 70), "use_cache_batch_idx": True, "rotary_dim": 0},
        {"page_size": 8, "dtype": "float16", "head_dim": 64, "head_dim_v": 64, "rotary_dim": 64},
        {"page_size": 48, "head_dim": 256, "head_dim_v": 256},
        {"page_size": 16, "window_size": (700, 30), "causal": False, "softcap": 20.0, "alibi_ndim": 2, "sinks": True},
        {"seqlen_q": (1, 2000, 0, 500), "values": "huge"},
        {"seqlen_q": 80, "seqlen_new": 5, "num_splits": 1, "num_heads_q": 32},
        {"seqlen_new": None, "rotary_dim": 0, "causal": False},
    ],
    ids=str,
)
def test_chunks_of_prompts(changed: dict[str, Any], cupy: Any) -> None:
    case = KVCacheCase(**CHUNKS | changed)
    found = attend(case, cupy)
    first = [to_numpy(x).tobytes() for x in found]
    assert_kvcache_close(found[0], lse=found[1], caches=(found[2], found[3]), **case.arrays(), **case.options)
    for planned in (False, True):
        assert [to_numpy(x).tobytes() for x in attend(case, cupy, planned)] == first


@pytest.fixture
def few_fill_tiles() -> Iterator[None]:
    with places.few_fill_tiles():
        yield


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_large_tiles_equal_reference(cupy: Any, few_fill_tiles: None, dtype: str) -> None:
    @settings(max_examples=10)
    @given(kvcache_cases(dtypes=(dtype,), page_sizes=(0, 8, 16, 24, 64), max_queries=100, wild=True))
    def run(case: KVCacheCase) -> None:
        check(case, cupy)

    run()


@pytest.mark.parametrize("num_splits", [0, 5])
def test_bits_are_the_same_in_every_run(num_splits: int, cupy: Any) -> None:
    """With a plan and without one, whatever kernel serves."""
    lengths = (9000, 5, 800, 4096, 0, 77, 2000)
    case = KVCacheCase(batch=7, lengths=lengths, seqlen_new=1, capacity=9100, num_splits=num_splits, **SERVING)
    first = [to_numpy(x).tobytes() for x in attend(case, cupy)]
    for planned in (True, False) * 5:
        assert [to_numpy(x).tobytes() for x in attend(case, cupy, planned)] == first


@pytest.mark.parametrize("num_splits", [1, 2, 7, 64])
def test_splits_of_their_own_make_results_the_same_in_any_batch(num_splits: int, cupy: Any) -> None:
    lengths = tuple(np.random.default_rng(num_splits).integers(0, 3000, 40).tolist())
    case = KVCacheCase(
        batch=40, lengths=lengths, seqlen_new=1, capacity=3001, num_splits=num_splits, **{**SERVING, "rotary_dim": 0}
    )
    check(case, cupy)
    arrays = case.arrays(cupy)
    whole = to_numpy(cufa.attention_with_kvcache(**arrays, num_splits=num_splits))
    for b in (0, 17, 39):
        own = {name: x if name.endswith("_cache") else x[b : b + 1] for name, x in case.arrays(cupy).items()}
        alone = to_numpy(cufa.attention_with_kvcache(**own, num_splits=num_splits))
        assert alone.tobytes() == whole[b : b + 1].tobytes()


def test_graphs_replay_while_lengths_and_pages_change(cupy: Any) -> None:
    """A step of two layers, captured once with its plan; lengths and tables change in place between replays."""
    batch, capacity, size = 6, 700, 16
    case = KVCacheCase(batch=batch, lengths=(0,) * batch, seqlen_new=1, capacity=capacity, **SERVING)
    cases = [replace(case, seed=seed) for seed in range(2)]
    layers = [each.arrays(cupy) for each in cases]
    rng = np.random.default_rng(0)
    for arrays in layers:  # finite, whatever becomes live
        for name in ("k_cache", "v_cache"):
            arrays[name][...] = cupy.asarray(rng.standard_normal(arrays[name].shape).astype(np.float32))
        arrays |= {name: layers[0][name] for name in ("cache_seqlens", "block_table")}
    angles = rng.uniform(-np.pi, np.pi, (capacity + size, 64)).astype(np.float32)
    rotary = {"rotary_cos": cupy.asarray(np.cos(angles)), "rotary_sin": cupy.asarray(np.sin(angles))}
    plan = plan_of(layers[0])
    cupy.cuda.Device().synchronize()  # the stream waits for no other

    def step() -> list[Any]:
        plan.update()
        return [cufa.attention_with_kvcache(**arrays | rotary, plan=plan) for arrays in layers]

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        step()  # which loads kernels
        stream.begin_capture()
        outs = step()
        graph = stream.end_capture()
    count = layers[0]["k_cache"].shape[0]
    for _ in range(20):
        lengths = rng.integers(0, capacity - 1, batch).astype(np.int32)
        table = rng.permutation(count)[: batch * -(-capacity // size)].reshape(batch, -1).astype(np.int32)
        with stream:
            layers[0]["cache_seqlens"].set(lengths)
            layers[0]["block_table"].set(table)
            before = [{name: to_numpy(x) for name, x in (arrays | rotary).items()} for arrays in layers]
            graph.launch(stream)
            stream.synchronize()
        for out, arrays, own in zip(outs, layers, before, strict=True):
            assert_kvcache_close(out, caches=(arrays["k_cache"], arrays["v_cache"]), **own)


@pytest.mark.parametrize("seed", range(4))
def test_traces_of_serving(seed: int, cupy: Any) -> None:
    """Sequences come and go, in pages that others had; each step packs chunks of prompts with single tokens."""
    rng = np.random.default_rng(seed)
    heads_q, heads_k, dim = [(8, 2, 64), (4, 4, 128), (12, 1, 96), (6, 2, 256)][seed]
    size, pages, slots, capacity = int(rng.choice([8, 16, 48, 64])), 160, 6, 1200
    shape = (pages, size, heads_k, dim)
    dtype = cupy.float16
    k_cache, v_cache = (cupy.full(shape, cupy.nan, dtype) for _ in range(2))
    angles = rng.uniform(-np.pi, np.pi, (capacity, dim // 2)).astype(np.float32)
    rotary = {"rotary_cos": cupy.asarray(np.cos(angles)), "rotary_sin": cupy.asarray(np.sin(angles))}
    rotary_interleaved = bool(seed % 2)
    free = rng.permutation(pages).tolist()
    table = np.full((slots, -(-capacity // size)), -1, np.int32)
    lengths, prompts = np.zeros(slots, np.int32), np.zeros(slots, int)
    for _ in range(25):
        for b in range(slots):
            if prompts[b] == 0 and (lengths[b] == 0 or rng.random() < 0.05):  # one ends, and another begins
                free += [int(page) for page in table[b] if page >= 0]
                table[b], lengths[b], prompts[b] = -1, 0, rng.integers(1, 300)
        rows = [
            min(int(prompts[b]) or 1, int(rng.choice([1, 16, 100])), capacity - int(lengths[b])) for b in range(slots)
        ]
        for b in range(slots):
            wanted = -(-(int(lengths[b]) + rows[b]) // size)
            have = int((table[b] >= 0).sum())
            if wanted - have > len(free):  # it waits for pages
                rows[b] = max(0, min(rows[b], have * size - int(lengths[b])))
            else:
                table[b, have:wanted] = [free.pop() for _ in range(wanted - have)]
        total = sum(rows)
        if total == 0:
            prompts[:] = 0
            continue
        q, k, v = (
            cupy.asarray(rng.standard_normal((total, heads, dim)).astype(np.float16))
            for heads in (heads_q, heads_k, heads_k)
        )
        call = {
            "k": k,
            "v": v,
            "cache_seqlens": cupy.asarray(lengths),
            "block_table": cupy.asarray(table),
            "cu_seqlens_q": cupy.asarray(np.cumsum([0, *rows]).astype(np.int32)),
            **rotary,
            "rotary_interleaved": rotary_interleaved,
            "causal": True,
        }
        before = to_numpy(k_cache), to_numpy(v_cache)
        out, lse = cufa.attention_with_kvcache(q, k_cache, v_cache, return_lse=True, **call)
        host = {name: to_numpy(x) if hasattr(x, "shape") else x for name, x in call.items()}
        assert_kvcache_close(out, to_numpy(q), *before, caches=(k_cache, v_cache), lse=lse, **host)
        lengths += np.array(rows, np.int32)
        prompts = np.maximum(0, prompts - rows)


@pytest.mark.parametrize("name", ["cupy", "torch"])
def test_values_are_checked_on_demand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths are read behind what the caller's stream does to them; what is refused is not written."""
    xp = framework(name)
    monkeypatch.setenv("CUFA_DEBUG", "1")
    monkeypatch.setattr(_call, "debugging", _call.debugging.__wrapped__)  # which remembers what it read
    case = KVCacheCase(batch=3, lengths=(40, 0, 20), seqlen_new=1, capacity=48, **SERVING | {"rotary_dim": 0})
    check(case, xp)
    arrays = case.arrays(xp)
    before = to_numpy(arrays["k_cache"]).tobytes()
    # A view of every second column, and work on a stream of its own that takes longer than a launch.
    wide = xp.zeros((3, 6), dtype=xp.int32, **({"device": "cuda"} if name == "torch" else {}))
    wide[:, ::2] = arrays["block_table"]
    arrays["block_table"] = wide[:, ::2]
    ones = xp.ones((4096, 4096), dtype=xp.float32, **({"device": "cuda"} if name == "torch" else {}))
    stream = xp.cuda.Stream(non_blocking=True) if name == "cupy" else xp.cuda.Stream()
    xp.cuda.Device().synchronize() if name == "cupy" else xp.cuda.synchronize()
    with stream if name == "cupy" else xp.cuda.stream(stream):
        cufa.attention_with_kvcache(**{**arrays, "k": None, "v": None})
        for _ in range(20):
            ones @ ones
        arrays["cache_seqlens"] += 8
        with pytest.raises(ValueError, match="sequence 0 has 48 keys in its cache, and 1 are appended, but there is"):
            cufa.attention_with_kvcache(**arrays)
        arrays["cache_seqlens"] -= 8
        arrays["block_table"][1, 0] = 1000
        with pytest.raises(ValueError, match=r"block_table\[1, 0\] is 1000, a page that sequence 1 uses"):
            cufa.attention_with_kvcache(**arrays)
    assert to_numpy(arrays["k_cache"]).tobytes() == before


def test_values_are_not_checked_in_captures(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFA_DEBUG", "1")
    monkeypatch.setattr(_call, "debugging", _call.debugging.__wrapped__)
    arrays = KVCacheCase(batch=3, lengths=(40, 0, 20), capacity=48, **SERVING | {"rotary_dim": 0}).arrays(cupy)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        cufa.attention_with_kvcache(**arrays)
        stream.begin_capture()
        with pytest.raises(cufa.UnsupportedError, match="with CUFA_DEBUG=1 the host reads"):
            cufa.attention_with_kvcache(**arrays)
        stream.end_capture()
