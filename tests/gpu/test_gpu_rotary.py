"""Rotary embedding on a GPU: the specification's properties."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from rotary import LAYOUTS, Call, calls

import cufa
from cufa.testing import to_numpy

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("framework", ["cupy", "torch"])
@settings(max_examples=60)
@given(call=calls(layouts=LAYOUTS))
def test_kernel_equals_reference(framework: str, call: Call) -> None:
    xp = pytest.importorskip(framework)
    call.check(call.run(xp))


@pytest.mark.parametrize("places", ["positions", "cu_seqlens"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_large_calls(places: str, interleaved: bool) -> None:
    """Threads turn several heads, in several rounds."""
    cupy = pytest.importorskip("cupy")
    sizes: dict[str, Any] = {
        "num_heads_q": 32,
        "num_heads_k": 8,
        "head_dim": 128,
        "rotary_dim": 128,
        "dtype": "bfloat16",
    }
    call = Call(batch=300, seqlen=20000, packed=True, places=places, interleaved=interleaved, **sizes)
    call.check(call.run(cupy))


def test_a_graph_turns_by_positions_as_they_are_by_then() -> None:
    cupy = pytest.importorskip("cupy")
    call = Call(places="offsets", dtype="float16", head_dim=64, rotary_dim=64)
    arrays = {name: cupy.asarray(x) for name, x in call.host().items()}
    expected = cufa.rotary(**arrays)
    first = arrays["offsets"].copy()
    arrays["offsets"][...] = 0
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()  # for which the stream does not wait
    with stream:
        stream.begin_capture()
        found = cufa.rotary(**arrays)
        graph = stream.end_capture()
        arrays["offsets"][...] = first
        graph.launch(stream)
    stream.synchronize()
    assert all(to_numpy(one).tobytes() == to_numpy(other).tobytes() for one, other in zip(found, expected, strict=True))
