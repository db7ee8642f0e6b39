"""The kernel of rotary embeddings, run on the CPU and held to the reference."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rotary import LAYOUTS, Call, calls
from sampling import examples

import emulated
from cufa._operations.rotary import ROTARY, ROTARY_BACKWARD
from cufa.testing import to_numpy

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())

# Each makes two kernels, for pairs side by side and halfway apart: chunks are 16 bytes, or single elements.
WHOLE = {"dims": ((64, 32), (128, 128)), "layouts": ("contiguous", "transposed", "fused", "wide", "reversed")}
SINGLE = {"dims": ((7, 6), (21, 2)), "layouts": (*LAYOUTS, "reversed")}
KINDS = pytest.mark.parametrize(
    ("dtype", "kind"), [("float16", WHOLE), ("bfloat16", SINGLE), ("float32", WHOLE)], ids=str
)
ORDERS = st.none() | st.integers(0, 999)


@KINDS
@settings(max_examples=examples(12, 25))
@given(data=st.data())
def test_kernel_equals_reference(dtype: str, kind: dict[str, Any], data: st.DataObject) -> None:
    call = data.draw(calls((dtype,), **kind))
    with emulated.Gpu(order=data.draw(ORDERS), num_sms=data.draw(st.sampled_from((1, 3)))) as gpu:
        found = tuple(map(to_numpy, call.run(gpu)))
        entries = [launched.function.entry for launched in gpu.launches]
    call.check(found)
    empty = not any(each.size for each in found)
    finds = ["attention_rotary_positions"] * call.places.startswith("cu_seqlens")
    assert entries == ([] if empty else [*finds, "attention_rotary"])


@pytest.mark.parametrize("interleaved", [False, True])
def test_threads_share_angles_among_heads(interleaved: bool) -> None:
    call = Call(batch=3, seqlen=70, num_heads_q=12, num_heads_k=5, head_dim=64, rotary_dim=48, interleaved=interleaved)
    found = []
    for num_sms in (1, 40):
        with emulated.Gpu(num_sms=num_sms) as gpu:
            found.append(tuple(map(to_numpy, call.run(gpu))))
    call.check(found[0])
    assert all(one.tobytes() == other.tobytes() for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("places", ["positions", "cu_seqlens and offsets"])
def test_gradients_are_turned_back(places: str) -> None:
    call = Call(packed=True, places=places, dtype="float16", head_dim=64, rotary_dim=64)
    host = call.host()
    options = {"interleaved": True, "inverse": True}
    turned = emulated.call(ROTARY, host, **options)
    gradients = emulated.call(
        ROTARY_BACKWARD,
        {f"d{name}_out" if name in "qk" else name: x for name, x in host.items()},
        interleaved=True,
        inverse=False,
    )
    for name in "qk":
        assert turned[f"{name}_out"].tobytes() == gradients[f"d{name}"].tobytes()
        assert (turned[f"{name}_out"] != host[name]).any()


@pytest.mark.parametrize("offsets", [[0, 7, 3, 9], [4, 6, 20], [0, -3, 5, 0, 0], [9, 9], [0]])
def test_offsets_of_any_content_mean_something(offsets: list[int]) -> None:
    """Each counts as the largest up to it, clamped; and positions outside of the table as the nearest within it."""
    call = Call(packed=True, places="cu_seqlens", dtype="float16", head_dim=16, seqlen=11)
    host = call.host() | {"cu_seqlens": np.array(offsets, np.int32)}
    host["offsets"] = np.array([3, -7, 2, 99][: len(offsets) - 1], np.int32)
    found = emulated.call(ROTARY, host, interleaved=True, inverse=False)["q_out"]
    ends = np.maximum.accumulate(np.clip(offsets, 0, 11))
    expected = host["q"].copy()
    for b, (begin, end) in enumerate(pairwise(ends)):
        if begin == end:
            continue
        at = np.clip(host["offsets"][b] + np.arange(end - begin), 0, 17).astype(np.int32)
        rows = {"q": host["q"][begin:end], "cos": host["cos"], "sin": host["sin"], "positions": at}
        expected[begin:end] = emulated.call(ROTARY, rows, interleaved=True, inverse=False)["q_out"]
    assert found.tobytes() == expected.tobytes()
