"""Merging states on a GPU: the specification's properties, and graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from states import LAYOUTS, Call, calls

import cufa
from cufa.testing import to_numpy

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cupy() -> Any:
    return pytest.importorskip("cupy")


@pytest.mark.parametrize("framework", ["cupy", "torch"])
@settings(max_examples=120)
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
    call = Call(shape=(4, 2048, 16, 128), states=states, dtype="bfloat16", values="apart")
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
