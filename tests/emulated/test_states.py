"""The kernels that merge states, run on the CPU and held to the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from states import LAYOUTS, Call, calls

import emulated
from cufa.testing import to_numpy

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())

# Each is a kernel or two, which take a second each to compile: chunks are 16 bytes, or single elements.
WHOLE = {"dims": (128,), "layouts": ("contiguous", "transposed", "wide", "reversed")}
SINGLE = {"dims": (5,), "layouts": (*LAYOUTS, "reversed")}
KINDS = pytest.mark.parametrize(
    ("dtype", "kind"), [("float16", WHOLE), ("bfloat16", SINGLE), ("float32", WHOLE)], ids=str
)
ORDERS = st.none() | st.integers(0, 999)


@KINDS
@settings(max_examples=12)
@given(data=st.data())
def test_kernels_equal_reference(dtype: str, kind: dict, data: st.DataObject) -> None:
    call = data.draw(calls((dtype,), **kind))
    with emulated.Gpu(order=data.draw(ORDERS)) as gpu:
        merged = tuple(map(to_numpy, call.merged(gpu)))
        gradients = tuple(map(to_numpy, call.gradients(gpu)))
    call.check_merged(*merged)
    call.check_gradients(gradients)


@pytest.mark.parametrize("dims", [20, 100, 256])
def test_rows_of_several_chunks_and_widths(dims: int) -> None:
    """8 bytes at a time, the same in a row that lanes do not fill, and a row for which there are too few lanes."""
    call = Call(shape=(2, 33, 3, dims), dtype="float16" if dims < 256 else "float32", values="apart", states=3)
    with emulated.Gpu() as gpu:
        call.check_merged(*map(to_numpy, call.merged(gpu)))
        call.check_gradients(tuple(map(to_numpy, call.gradients(gpu))))


def test_blocks_take_several_rounds() -> None:
    """More chunks than all threads of a small GPU; and results do not depend on how many there are."""
    call = Call(shape=(3, 150, 7, 64), dtype="float16", values="apart")
    found = []
    for num_sms in (1, 40):
        with emulated.Gpu(num_sms=num_sms) as gpu:
            found.append([*map(to_numpy, (*call.merged(gpu), *call.gradients(gpu)))])
            blocks = [launched.blocks for launched in gpu.launches]
        assert blocks == ([4, 4] if num_sms == 1 else [99, 99])
    assert all(one.tobytes() == other.tobytes() for one, other in zip(*found, strict=True))
    call.check_merged(*found[0][:2])
    call.check_gradients(tuple(found[0][2:]))


def test_states_without_keys_are_not_read() -> None:
    call = Call(shape=(2, 9, 4, 64), dtype="float16", values="none")
    with emulated.Gpu() as gpu:
        out, lse = map(to_numpy, call.merged(gpu))
    assert not out.any() and np.isneginf(lse).all()
    with emulated.Gpu() as gpu:
        gradients = replace(call, dlse=False).gradients(gpu)
    assert not any(to_numpy(each).any() for each in gradients)
