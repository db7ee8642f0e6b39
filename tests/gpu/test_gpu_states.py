"""Merging states on a GPU: the specification's properties, and graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from states import LAYOUTS, Call, calls

import cufa
from cufa import reference
from cufa.testing import to_numpy

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cupy() -> Any:
    return pytest.importorskip("cupy")


@pytest.mark.parametrize("framework", ["cupy", "torch"])
@settings(max_examples=60)
@given(call=calls(layouts=LAYOUTS))
def test_kernels_equal_reference(framework: str, call: Call) -> None:
    xp = pytest.importorskip(framework)
    call.check_merged(*call.merged(xp))
    call.check_gradients(call.gradients(xp))


@settings(max_examples=30)
@given(call=calls(layouts=("contiguous",)))
def test_negative_strides(cupy: Any, call: Call) -> None:
    call = replace(call, layouts=("reversed", "contiguous", "reversed", "wide"))
    call.check_merged(*call.merged(cupy))
    call.check_gradients(call.gradients(cupy))


@pytest.mark.parametrize("states", [2, 17, None])
def test_large_states(cupy: Any, states: int | None) -> None:
    """More chunks than all threads of a GPU, and the same bits whatever is beside a row."""
    call = Call(shape=(4, 512, 16, 128), states=states, dtype="bfloat16", values="apart")
    out, lse = call.merged(cupy)
    call.check_merged(out, lse)
    call.check_gradients(call.gradients(cupy))
    arrays = call.arrays(cupy)
    given = {name: arrays[name] for name in ("out_a", "lse_a", "out_b", "lse_b") if name in arrays}
    one = {
        name: array[..., 2:3, 100:101, 3:4, :] if name[0] == "o" else array[..., 2:3, 3:4, 100:101]
        for name, array in given.items()
    }
    again = cufa.merge_states(**one)
    np.testing.assert_array_equal(to_numpy(again[0]).view(np.uint16), to_numpy(out[2:3, 100:101, 3:4]).view(np.uint16))
    np.testing.assert_array_equal(to_numpy(again[1]), to_numpy(lse[2:3, 3:4, 100:101]))


def test_a_graph_merges_what_its_states_hold_by_then(cupy: Any) -> None:
    call = Call(shape=(2, 33, 4, 64), dtype="float16", values="apart")
    other = Call(shape=(2, 33, 4, 64), dtype="float16", values="apart", seed=1)
    arrays = {name: array for name, array in call.arrays(cupy).items() if name[-1] in "ab"}
    cufa.merge_states(**arrays)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        out, lse = cufa.merge_states(**arrays)
        graph = stream.end_capture()
        for name, array in other.arrays(cupy).items():
            if name in arrays:
                arrays[name][...] = array
        graph.launch(stream)
    stream.synchronize()
    other.check_merged(out, lse)


@pytest.mark.parametrize("length", [4096, 4099])
def test_parts_of_a_long_prefix(cupy: Any, length: int) -> None:
    """And three keys that are left."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((64, 1, 32, 128)).astype(np.float16)
    k_prefix, v_prefix = rng.standard_normal((2, length, 8, 128)).astype(np.float16)
    k, v = rng.standard_normal((2, 64, 30, 8, 128)).astype(np.float16)
    arrays = [cupy.asarray(x) for x in (q, k_prefix, v_prefix, k, v)]
    before = dict(cufa.stats().launches)
    out = to_numpy(cufa.attention_shared_prefix(*arrays))
    merges = [words for words in cufa.stats().launches if "merge" in words]
    assert sum(cufa.stats().launches[each] - before.get(each, 0) for each in merges) == 1 + length % 2
    for b in (0, 41, 63):
        whole = (np.concatenate(x)[None] for x in ((k_prefix, k[b]), (v_prefix, v[b])))
        right = reference.attention(q[b : b + 1], *whole)
        np.testing.assert_allclose(out[b : b + 1].astype(np.float64), right, atol=2e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_shared_prefixes(cupy: Any, packed: bool) -> None:
    """A common one, a level of others below it, and own keys."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((24, 2, 8, 64)).astype(np.float16)
    k_prefix, v_prefix = rng.standard_normal((2, 3000, 2, 64)).astype(np.float16)
    level = rng.standard_normal((2, 700, 2, 64)).astype(np.float16)
    rows, lengths = np.array([0, 10, 10, 48], np.int32), np.array([0, 300, 400, 700], np.int32)
    k, v = rng.standard_normal((2, 24, 80, 2, 64)).astype(np.float16)
    host: dict[str, Any] = {"q": q, "k": k, "v": v}
    if packed:
        host = {name: x.reshape(-1, *x.shape[2:]) for name, x in host.items()}
        host |= {"cu_seqlens_q": np.arange(0, 49, 2), "cu_seqlens_k": np.arange(0, 24 * 80 + 1, 80)}
    arrays = {name: cupy.asarray(x.astype(np.int32) if x.ndim == 1 else x) for name, x in host.items()}
    arrays |= {"k_prefix": cupy.asarray(k_prefix), "v_prefix": cupy.asarray(v_prefix)}
    levels = [(*map(cupy.asarray, level), cupy.asarray(rows), cupy.asarray(lengths))]
    out = to_numpy(cufa.attention_shared_prefix(**arrays, levels=levels, causal=True)).reshape(q.shape)
    for b in range(24):
        part = slice(0, 300) if b < 5 else slice(400, 700)
        whole = (np.concatenate(x)[None] for x in ((k_prefix, level[0][part], k[b]), (v_prefix, level[1][part], v[b])))
        right = reference.attention(q[b : b + 1], *whole, causal=True)
        np.testing.assert_allclose(out[b : b + 1].astype(np.float64), right, atol=2e-3)
